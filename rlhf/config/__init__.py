"""The configuration: schema with types and ranges, keys, loading, validation.

Values live in conf/. Torch is never imported here.
"""
