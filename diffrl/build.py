"""From settings to objects: the model, its policy, its env."""

import math
from pathlib import Path

import torch

from diffrl import datasets, memory, processes
from diffrl.algorithms.guidance.base import Guidance
from diffrl.config import Config
from diffrl.conflicts import check
from diffrl.datasets import Entry, PictureFiles
from diffrl.envs.denoising import DenoisingVectorEnv
from diffrl.envs.prompts import load_prompts
from diffrl.errors import DiffRLError
from diffrl.log import console
from diffrl.policy import Policy
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.schedule import DDIMSchedule
from diffrl.types import Backbone, Reward, stream_seed

_DATASET = 7  # a stream of random numbers
_MOST_COMPILATIONS = 32
_FULL = "The model alone does not fit beside what else is there: end that, or take another device."


class Setup:
    """The loaded model of a config, and what is made from it.

    Whether a GPU rounds float32 products (`env.precision`) holds for the process: the last one made says.

    Raises:
        DiffRLError: settings that contradict each other, before anything is loaded or written.
    """

    def __init__(self, config: Config) -> None:
        check(config)
        self.config = config
        tf32 = getattr(config.env, "precision", "fp32") != "fp32"
        self.device = processes.join(_device(config.device), tf32=tf32)
        console.quiet = not processes.is_first()
        if getattr(config.env, "random_weights", False):
            console.print("env.random_weights=true: for speed and memory alone; the result means nothing.")
        self.prompts = load_prompts(config.prompts, self.num_classes())
        self.eval_prompts = load_prompts(config.eval_prompts or config.prompts, self.num_classes())
        entries = self._read_dataset()
        with memory.advised(f"device={self.device}", _FULL):
            self.backbone: Backbone = config.env.load().to(self.device)
        self.schedule = DDIMSchedule(self.backbone.scheduler, config.env.num_steps, config.env.eta).to(
            self.device
        )
        self.dataset: PictureFiles | None = None
        if entries is not None:
            self.dataset = PictureFiles(entries, self.backbone.image_size, config.dataset_workers)

    def make_policy(self, num_classes: tuple[int, ...]) -> Policy:
        """Return the policy: the pretrained model with fresh adapters and no control learnt yet."""
        policy = Policy(
            self.backbone.unet,
            self.schedule,
            self.backbone.encode_prompts([""]),
            guidance_scale=self.config.env.guidance_scale,
            num_classes=num_classes,
            lora=self.config.policy,
            checkpointing=self.config.env.checkpointing,
            seed=self.config.seed,
        )
        if self.config.env.compile:
            # adapters on or off, a graph or none, a few batch sizes of each: past the limit all is eager
            torch._dynamo.config.cache_size_limit = _MOST_COMPILATIONS  # its name in torch 2.6 too
            policy.unet.compile()  # in place: its weights keep their names
        return policy

    def make_env(self, reward: Reward, num_envs: int, group_size: int = 1) -> DenoisingVectorEnv:
        """Return an env of this model with `reward`."""
        return DenoisingVectorEnv(
            self.backbone,
            self.schedule,
            reward,
            self.prompts,
            num_envs=num_envs,
            group_size=group_size,
            dataset=self.dataset,
            reward_timeout=self.config.reward_timeout,
        )

    def make_guided(
        self, policy: Policy, reward: Reward, num_pictures: int, envs: int | None = None
    ) -> Guidance:
        """Return what evaluations draw with: the guided policy, at most `num_pictures` at a time.

        No more either than fit into `envs` envs, by default `eval_batch`: a picture takes as many as the
        guidance has particles.
        """
        at_once = max((envs or self.config.eval_batch) // self.config.guidance.population, 1)
        return self.guide(policy, reward, min(num_pictures, at_once))

    def guide(self, policy: Policy, reward: Reward, num_pictures: int) -> Guidance:
        """Return the policy under its guidance, in an env that draws `num_pictures` at once.

        A surrogate gives way to what it stands for: it serves training, and a stored run has none.
        """
        guidance = self.config.guidance
        if isinstance(reward, OnlineSurrogateReward):
            reward = reward.of
        env = self.make_env(reward, num_pictures * guidance.population, guidance.population)
        env.prompts = self.eval_prompts
        return guidance.attach(policy, env)

    @property
    def target_gamma(self) -> float:
        """Gamma of the law that is aimed at: the algorithm's and the guidance's together, else 1.

        Guidance by p(y|x)^g of a policy that has learnt p_ref p(y|x)^a aims at p_ref p(y|x)^(a + g).
        """
        own = self.config.algo.target_gamma(math.prod(self.backbone.latent_shape))
        aims = [gamma for gamma in (own, self.config.guidance.target_gamma) if gamma is not None]
        return sum(aims) if aims else 1.0

    @property
    def z_known(self) -> bool:
        """Whether a learned reward's log Z is of the model, steps and prompts that are evaluated.

        It is of the pictures that the classifier was held against, which a file's were drawn elsewhere.
        """
        if getattr(self.config.reward, "classifier", None) is not None or self.eval_prompts != self.prompts:
            return False
        # Z is over all prompts, whatever the label: so must be the pictures that each label is asked of
        asked: dict[object, set[str]] = {}
        for prompt in self.prompts:
            asked.setdefault(getattr(prompt, "label", None), set()).add(str(prompt))
        return len({frozenset(prompts) for prompts in asked.values()}) == 1

    def seed(self, *stream: int) -> int:
        """Return a seed for each purpose, from the run's seed and `stream`."""
        return stream_seed(self.config.seed, *stream)

    def generator(self, *stream: int) -> torch.Generator:
        """Return a generator of its own for each purpose."""
        return torch.Generator(self.device).manual_seed(self.seed(*stream))

    def num_classes(self) -> tuple[int, ...]:
        """Return the number of classes of each attribute of the label, before any fit."""
        count = self.config.reward.num_classes
        return count if isinstance(count, tuple) else (count,)

    def _read_dataset(self) -> list[Entry] | None:
        """Return what `dataset` holds, no picture opened yet."""
        if self.config.dataset is None:
            return None
        measures = getattr(self.config.reward, "measures", [])
        # in a file a joint label has a number for each measure too
        counts = (2,) * len(measures) if getattr(self.config.reward, "joint", False) else self.num_classes()
        entries, notes = datasets.read(Path(self.config.dataset), measures, counts)
        if (most := self.config.dataset_pictures) is not None:
            entries = datasets.some(entries, most, self.seed(_DATASET))
        for note in notes:
            console.print(f"dataset={self.config.dataset}: {note}")
        return entries


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DiffRLError(f"device={name}: no such device. Use auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DiffRLError(f"device={name}: PyTorch sees no CUDA device. Use device=cpu.")
    return device
