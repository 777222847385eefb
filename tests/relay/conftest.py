from tests.support.relay_fixtures import gemini, hardware, relay, sdk, start_relay  # noqa: F401  pytest finds them by name
