"""The parts of a client's request: identity, JSON body, upload.

Begin with `identity.identify`, `json_body.read_json`, `upload.Upload`, `body_reader.BodyReader`.

May import: relay.http, relay.telemetry, relay.upstream, licences, credits, _util.
"""
