#!/bin/sh
# Several rewards are one: the sum of weight x clip(scale x reward).
#
# The scale brings each to about 1, so that the weights can be compared; the clip keeps one of them from
# paying for all. With a black box among them the sum is one. A part's own settings are reward.parts.NAME.x.
diffrl train algo=ddpo 'reward=[jpeg,soft_light.py:SoftLight]' \
    'reward.weights=[1,2]' 'reward.scales=[0.5,10]' reward.clip=3 \
    reward.parts.SoftLight.target=0.6 "$@"
