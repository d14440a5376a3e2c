"""What `diffrl` can be told to do, a file each: its help, `arguments(parser)` and `run(options)`.

Nothing heavy is imported before one runs: `diffrl --help` is to be there at once.
"""
