"""Is it sound? Each check raises an error with a line for every fault and how to mend it; seconds, no GPU.

python check.py
"""

from best_half import BestHalf
from grey_emoji import GreyEmoji
from redness import redness
from soft_light import SoftLight

import diffrl

diffrl.check_reward(redness)
diffrl.check_reward(SoftLight)
diffrl.check_env(GreyEmoji)
diffrl.check_algorithm(BestHalf)
print("no faults")
