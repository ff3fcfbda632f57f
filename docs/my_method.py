"""A scoring method of your own: flexmoe compress tiny -o mine --method docs/my_method.py:score"""

import flexmoe


@flexmoe.statistic("reach_EI", when="forward")
def reach(pairs):
    """How far a channel's activation gets, per routed token [S, I]."""
    return pairs.h_SI.abs().float() * pairs.weight_S.float()[:, None]


@flexmoe.method("reach", paper="mine", needs=("reach_EI",), allocate="global")
def score(layer, stats):
    """Mean weighted activation of a channel over the tokens routed to its expert."""
    return stats.mean("reach_EI")
