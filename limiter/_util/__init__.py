"""General mechanisms that know nothing of this project's domain.

Begin with `timestamps.iso_from_ms`, `atomic_file.AtomicFile`, `backoff.Backoff`, `cancellation.run_to_completion`.

May import: nothing of limiter.
"""
