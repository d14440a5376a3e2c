"""What a run will take: seconds and memory of each stage, from one piece of it done here and now.

A piece is what the run does over and over, at the size it does it: a batch of pictures drawn, a small fit,
an evaluation, a picture grid, an update's micro-batch. Its time is multiplied by how often the run does it.
The memory is this process's, which has then done all that the run does. Nothing is written.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from diffrl.algorithms.base import resized
from diffrl.build import Setup
from diffrl.config import Config
from diffrl.datasets import PictureFiles
from diffrl.errors import DiffRLError
from diffrl.evaluate import GRID_COLUMNS, picture_grid
from diffrl.learned import is_at_hand, make_reward, rehearsal_size, rehearse
from diffrl.meter import now, peak_memory
from diffrl.policy import Policy, Pretrained
from diffrl.restore import measure
from diffrl.rewards.closed_form import ClosedForm
from diffrl.rewards.jpeg import Jpeg
from diffrl.rollout import rollout
from diffrl.schedule import DDIMSchedule
from diffrl.types import Context, Reward, Trajectory

_LARGE = 100_000_000  # parameters; on a CPU an update of such a network takes minutes
_FEW_STEPS = 2  # with env.checkpointing the memory does not grow with them


@dataclass(frozen=True)
class Stage:
    """A line of the plan."""

    name: str
    times: float  # that the piece is done
    calls: float  # of the network, in all of them
    seconds: float | None  # in all of them; None: it was not timed
    memory: float  # the most so far, bytes: of the device on a GPU, of the process on a CPU


def plan(config: Config) -> list[Stage]:
    """Return what `diffrl train` with these settings will do, stage by stage.

    A model that is not here is replaced by one of random weights. A large one on a CPU is asked for its
    memory alone: one picture, two steps, and the rest in proportion.

    Raises:
        DiffRLError: settings that contradict each other.
    """
    begin = time.perf_counter()
    setup = _setup(config)
    parameters = sum(parameter.numel() for parameter in setup.backbone.unet.parameters())
    too_large = setup.device.type == "cpu" and parameters > _LARGE
    if too_large:
        setup.schedule = DDIMSchedule(setup.backbone.scheduler, _FEW_STEPS, config.env.eta)
    policy = setup.make_policy(setup.num_classes())
    meter = _Meter(setup, policy)
    meter.stages.append(Stage("load the model", 1, 0, time.perf_counter() - begin, meter.memory()))
    if too_large:
        return [*meter.stages, _memory_alone(setup, policy, meter)]
    reward = _reward(setup, policy, meter)
    _evaluations(setup, policy, reward, meter)
    _updates(setup, policy, reward, meter)
    return meter.stages


class _Meter:
    """Does a piece, and notes what all of them will take."""

    def __init__(self, setup: Setup, policy: Policy) -> None:
        self.stages: list[Stage] = []
        self._policy, self._cuda = policy, setup.device.type == "cuda"

    def note(self, name: str, times: float, piece: Callable[[], Any]) -> Any:
        """Return what the piece returns; it is done once."""
        calls, begin = self._policy.num_calls, now(self._cuda)
        result = piece()
        seconds, calls = now(self._cuda) - begin, self._policy.num_calls - calls
        self.stages.append(Stage(name, times, times * calls, times * seconds, self.memory()))
        return result

    def memory(self) -> float:
        """Return the peak so far, bytes."""
        return peak_memory(self._cuda)


def _setup(config: Config) -> Setup:
    try:
        return Setup(config)
    except DiffRLError:
        if not hasattr(config.env, "random_weights") or config.env.random_weights:
            raise
        config.env = replace(config.env, random_weights=True)
        return Setup(config)


def _reward(setup: Setup, policy: Policy, meter: _Meter) -> Reward:
    """Return the reward; the fit of one that is not fitted yet is rehearsed: it costs the same."""
    if is_at_hand(setup):
        return make_reward(setup, policy)
    pictures: torch.Tensor | PictureFiles
    if setup.dataset is not None:
        pictures, count = setup.dataset, len(setup.dataset)
    else:
        count = setup.config.reward.num_pictures
        at_once = min(setup.config.eval_batch, count)
        env = setup.make_env(Jpeg(), at_once)

        def draw() -> torch.Tensor:
            return rollout(env, Pretrained(policy), setup.generator(1), seed=0).images

        pictures = meter.note("draw the offline data set", -(-count // at_once), draw)
    times = count / rehearsal_size(setup)
    return meter.note("fit the classifier", times, lambda: rehearse(setup, pictures))


def _evaluations(setup: Setup, policy: Policy, reward: Reward, meter: _Meter) -> None:
    config, few = setup.config, setup.config.eval_pictures
    before_last = 1 + (config.algo.updates - 1) // config.eval_every if config.algo.updates else 0
    before_last += config.keep_best is not None  # of the last update's weights, before the best are taken
    if isinstance(reward, ClosedForm):
        meter.note("evaluate", before_last + 1, lambda: measure(setup, policy, reward, few))
        return
    at_once = setup.make_guided(policy, reward, 4 * few).env.num_envs // config.guidance.population

    def drawn(count: int) -> int:
        """Return pictures: in whole batches, by policy and reference, and one more to time them."""
        batch = min(count, at_once)
        return -(-count // batch) * batch * (2 if config.env.eta else 1) + batch

    last = drawn(4 * few) / drawn(few) * (1 + len(config.eval_scales))
    meter.note("evaluate", before_last + last, lambda: measure(setup, policy, reward, few))
    actor = setup.make_guided(policy, reward, GRID_COLUMNS)
    meter.note("draw the grids", before_last + 1, lambda: picture_grid(actor, setup.eval_prompts))


def _updates(setup: Setup, policy: Policy, reward: Reward, meter: _Meter) -> None:
    algo = setup.config.algo
    if not algo.updates:
        return
    update = _Update(setup, policy, reward, algo, algo.micro_batch_size)
    update()  # warms up
    parts = algo.batch_size // algo.micro_batch_size
    meter.note("update", algo.updates * parts, update)
    if not algo.needs_gradient:  # then the episodes of a batch are kept until it is learnt from
        more = (parts - 1) * update.episode_bytes
        meter.stages[-1] = replace(meter.stages[-1], memory=meter.stages[-1].memory + more)


def _memory_alone(setup: Setup, policy: Policy, meter: _Meter) -> Stage:
    """Return the updates' memory: what is held, and for each picture of a micro-batch what one takes."""
    algo, held = setup.config.algo, meter.memory()
    if hasattr(algo, "truncation"):  # of which few steps are enough
        algo = replace(algo, truncation=replace(algo.truncation, kind="last", count=1, low=0, high=None))
    _Update(setup, policy, _Mean(setup.num_classes()), algo, 1)()
    memory = held + (meter.memory() - held) * algo.micro_batch_size
    return Stage("update", algo.updates, 0, None, memory)


class _Update:
    """One update, all of whose pictures are one micro-batch of `size`."""

    def __init__(self, setup: Setup, policy: Policy, reward: Reward, algo: Any, size: int) -> None:
        self._algo = resized(algo, size)
        self._policy, self._setup = policy, setup
        self._env, self._optimizer = setup.make_env(reward, size), self._algo.make_optimizer(policy)
        self._env.reset(seed=setup.config.seed)
        self.episode_bytes = 0

    def __call__(self) -> None:
        """Collect, and learn."""
        self._algo.update(self._collected(), self._policy, self._optimizer)

    def _collected(self) -> Iterator[Trajectory]:
        episodes = self._algo.collect(self._env, self._policy, self._setup.generator(2))
        tensors = [value for value in vars(episodes).values() if isinstance(value, torch.Tensor)]
        self.episode_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        yield episodes


@dataclass
class _Mean:
    """Stands in for a reward that is not fitted: differentiable, at no cost."""

    num_classes: tuple[int, ...]
    differentiable: ClassVar[bool] = True

    def __call__(self, images: torch.Tensor, context: Context) -> torch.Tensor:
        return images.mean((1, 2, 3))
