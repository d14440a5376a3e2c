"""A reward is a function: pictures and what was asked for in, one number a picture out.

diffrl train algo=ddpo reward=redness.py:redness

It may do anything, ask a server or write a file, because it is called a black box: use it with an algorithm
that needs no gradient (ddpo, rwr), or guide by it (guidance=svdd or smc).
"""


def redness(images, context):
    """How much more red than green and blue there is. Pictures are [N, 3, S, S] in [0, 1]."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
