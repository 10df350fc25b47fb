"""Formats: how the rows of a data set become turns and answers. No code per data set.

`fields` knows which columns a format has, `messages` reads conversations, `rows` reads a row.
"""
