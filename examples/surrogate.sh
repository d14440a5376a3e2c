#!/bin/sh
# A gradient for a reward that has none: a regression on the pictures that it has scored so far.
#
# After each update the true reward is asked about the pictures just drawn, and the regression is fitted anew,
# until `queries` are spent. So a method that follows gradients can be held against a black-box one at equally
# many true queries: reward/queries in metrics.jsonl. Evaluations ask the true reward, and are not counted.
diffrl train algo=reward_backprop 'reward=surrogate[jpeg]' reward.queries=640 "$@"
