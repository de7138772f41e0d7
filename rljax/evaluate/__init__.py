"""Measuring a policy: on a held-out set while it trains, on named sets from the command line."""
