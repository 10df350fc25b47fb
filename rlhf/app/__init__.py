"""The local page: runs, chat, blind comparison and data, in a browser on this machine.

What it shows comes from the packages below; here are only its tabs and the process of its models.
"""
