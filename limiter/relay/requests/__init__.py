"""What a client sent: identity, JSON body, upload.

May import: relay.http, relay.upstream, licences, credits, errors.
"""
