"""`page-primer bench`: a user's own server with and without priming, interleaved, and a verdict.

    variants -> rounds of (server, load, tree) -> intervals -> render

Nothing here is imported by prime(), nor by a server that is measured.
"""
