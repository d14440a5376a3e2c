"""The only training loop.

A run that is stopped anywhere and resumed writes the same numbers as one that never was, to the bit: what
is drawn in an update comes from the seed and the update's number alone, and a checkpoint holds the rest.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl import __version__, checkpoint, memory, processes, settings_file, weights
from diffrl import config as settings
from diffrl.algorithms.averaging import WeightAverage
from diffrl.algorithms.base import SKIPPED
from diffrl.build import Setup
from diffrl.errors import DiffRLError
from diffrl.evaluate import GRID_COLUMNS, picture_grid
from diffrl.evaluate_mixture import MixtureEvaluation
from diffrl.guards import Guards
from diffrl.log import RunLog, console, progress
from diffrl.policy import Policy
from diffrl.restore import CONFIG_FILE, measure
from diffrl.rewards.closed_form import ClosedForm
from diffrl.rewards.log_likelihood import LogLikelihood
from diffrl.rewards.surrogate import OnlineSurrogateReward
from diffrl.settings_file import AT_A_TIME
from diffrl.stop import StopSignals
from diffrl.types import EVALUATION_SEED, Context, Reward, Trajectory

CHECKPOINTS = "checkpoints"
"""The name of their folder in a run's."""

_ACTIONS, _EPISODES, _SHUFFLES = 2, 5, 6  # streams of random numbers
_MOST_SKIPPED = 5  # updates in a row without a finite gradient


class Run:
    """One policy in one env with one algorithm, for `algo.updates` updates.

    Args:
        setup: the model and the settings.
        policy: is trained.
        reward: scores its pictures.
        folder: of the run.
    """

    def __init__(self, setup: Setup, policy: Policy, reward: Reward, folder: Path) -> None:
        self.config, self.setup, self.policy, self.reward, self.folder = (
            setup.config, setup, policy, reward, folder,
        )  # fmt: skip
        algo = self.config.algo
        micro_batches = algo.batch_size // algo.micro_batch_size
        if micro_batches < processes.count():
            raise DiffRLError(
                f"algo.batch_size={algo.batch_size} algo.micro_batch_size={algo.micro_batch_size}: "
                f"{micro_batches} micro-batches for {processes.count()} processes; each needs one at least."
            )
        self.micro_batches = processes.part(micro_batches)
        self.env = setup.make_env(reward, algo.micro_batch_size, algo.group_size)
        self.optimizer = algo.make_optimizer(policy)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = policy.lora_parameters() + policy.embedding_parameters()
        self.average = WeightAverage(self.parameters)
        self.surrogate = reward if isinstance(reward, OnlineSurrogateReward) else None
        self.mixture = MixtureEvaluation(setup, policy, reward) if isinstance(reward, ClosedForm) else None
        self.guards = Guards(self.config.keep_best, self.config.patience, algo.restraint)
        # as they are now: a file of the user's own may be edited later
        self.facts = settings_file.facts(self.config)
        # of one that is learnt from: what a classifier was fitted to no longer counts
        learnt = setup.dataset if algo.needs_labels else None
        self.data = learnt.content() if learnt is not None else None
        self.update = 0  # so many are taken
        self.done = False  # and measured
        self.skipped = 0  # of the last ones, in a row
        self.log_size = 0  # bytes of `metrics.jsonl` at the last checkpoint
        # on training so far: pictures drawn, forward passes (backward ones aside) and seconds
        self.spent = {"spent/pictures": 0.0, "spent/network_calls": 0.0, "spent/seconds": 0.0}

    def loop(self, log: RunLog, stop: StopSignals) -> None:
        """Train, evaluating every `eval_every` updates and at the end, until that or a signal to stop."""
        algo, every = self.config.algo, self.config.checkpoint_every
        if algo.updates and not self.update:
            self._evaluate(log)
        with progress(settings.chosen(self.config, "algo"), algo.updates) as bar:
            bar.advance(self.update)
            while self.update < algo.updates:
                metrics = self.train_once()
                log.write(self.update, metrics | self.spent)
                bar.advance(note=_note(metrics))
                if self.update == algo.updates:
                    break
                if self.update % self.config.eval_every == 0:
                    self._evaluate(log)
                if self.guards.exhausted:
                    break
                stopped = any(processes.gathered([stop.asked]))
                if stopped or self.update % every == 0 or self.guards.best_update == self.update:
                    self.log_size = log.size()
                    self.save(self.folder / CHECKPOINTS)
                if stopped:
                    return
        self.average.apply()
        if self.guards.metric is not None:
            if not self.guards.exhausted:  # else it is among those judged
                self._evaluate(log)
            if self.guards.best is not None:
                weights.load(self.policy, self.folder)  # the best's
        self._evaluate(log, last=True)
        self.log_size, self.done = log.size(), True
        self.save(self.folder / CHECKPOINTS)

    def train_once(self) -> dict[str, float]:
        """Take the next update and return its metrics."""
        algo, rate = self.config.algo, self.config.algo.rate(self.update)
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
            group["rates"] = base * rate, base * algo.rate(self.update + 1)
        self._seed_shuffles()
        begin, calls = time.perf_counter(), self.policy.num_calls
        hits: list[Tensor] = []
        drawn: list[tuple[Tensor, Context]] = []
        size, batch = algo.micro_batch_size, algo.batch_size
        with memory.told(AT_A_TIME[0], size, self.folder, of=batch, group=algo.group_size):
            metrics = algo.update(self._collect(hits, drawn), self.policy, self.optimizer)
        if self.surrogate is not None:
            metrics |= self.surrogate.observe(drawn, self.config.reward_timeout)
        if hits:
            metrics["rollout/accuracy"] = float(processes.joined(torch.cat(hits)).float().mean())
        calls = int(processes.summed({"": self.policy.num_calls - calls})[""])
        seconds = time.perf_counter() - begin
        if algo.averaged(self.update):
            self.average.add()
        self.update += 1
        lost = SKIPPED in metrics and "train/grad_norm_lora" not in metrics  # every step of it
        self.skipped = self.skipped + 1 if lost else 0
        if self.skipped == _MOST_SKIPPED:
            raise DiffRLError(
                f"update {self.update}: no finite gradient for {_MOST_SKIPPED} updates in a row; none was "
                "taken. Lower algo.learning_rate, or look at the reward's gradient ('diffrl doctor')."
            )
        self.spent["spent/pictures"] += algo.batch_size
        self.spent["spent/network_calls"] += calls
        self.spent["spent/seconds"] += seconds
        return metrics | {
            "time/seconds_per_image": seconds / algo.batch_size,
            "time/calls_per_image": calls / algo.batch_size,
            "train/learning_rate": self.rates[0] * rate,
        }

    def _collect(self, hits: list[Tensor], drawn: list[tuple[Tensor, Context]]) -> Iterator[Trajectory]:
        """Yield our micro-batches of an update one by one.

        Noted are which pictures hit their class, and those to ask the reward that a surrogate stands for.
        """
        for number in self.micro_batches:
            self.env.reset(seed=self.setup.seed(_EPISODES, self.update, number))
            generator = self.setup.generator(_ACTIONS, self.update, number)
            trajectory = self.config.algo.collect(self.env, self.policy, generator)
            # what is learnt from with its true label hits it always
            if isinstance(self.reward, LogLikelihood) and not self.config.algo.needs_labels:
                label = trajectory.context.label.cpu()
                hits.append((self.reward.true_class(trajectory.images) == label).all(1))
            if self.surrogate is not None:
                drawn.append((trajectory.images, trajectory.context))
            yield trajectory
        # what follows is drawn alike by all, whatever a reward has drawn for ours
        self._seed_shuffles()

    def _seed_shuffles(self) -> None:
        torch.manual_seed(self.setup.seed(_SHUFFLES, self.update))  # the same in every process

    def save(self, parent: Path) -> None:
        """Write a checkpoint of everything that decides the next number."""
        if not processes.is_first():
            return
        tensors: dict[str, Tensor] = {f"policy.{n}": p for n, p in enumerate(self.parameters)}
        tensors |= {f"average.{n}": mean for n, mean in enumerate(self.average.means)}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
        if self.surrogate is not None:
            tensors |= {f"reward.{name}": value for name, value in self.surrogate.state_dict().items()}
        state = {
            "update": self.update,
            "done": self.done,
            "averaged": self.average.count,
            "skipped": self.skipped,
            "log_size": self.log_size,
            "spent": self.spent,
            "algorithm": self.config.algo.state_dict(),
            "guards": self.guards.state_dict(),
            "settings": self.facts,
            "versions": {"diffrl": __version__, "torch": torch.__version__},
        }
        best = self.guards.best_update if self.config.keep_best else None
        keep = self.config.keep_last
        # of a run without updates, the first checkpoint and the one of its end are both of update 0
        step = self.update if self.config.algo.updates else int(self.done)
        checkpoint.write(parent, step, tensors, state, claims=self._claims(), keep=keep, spare=best)

    def load(self, parent: Path) -> None:
        """Take up the last checkpoint that is whole; say which ones are not."""
        for folder in checkpoint.newest_first(parent):
            try:
                stored = checkpoint.read(folder)
            except checkpoint.DamagedError as error:
                console.print(f"[bold]{error}[/] The one before it is tried.")
                continue
            try:
                return self._take_up(folder, stored)
            except KeyError as missing:
                version = stored.state.get("versions", {}).get("diffrl")
                raise DiffRLError(
                    f"{folder}: it lacks {missing}; diffrl {version} wrote it, this is {__version__}. "
                    "Train again under another name."
                ) from missing
        raise DiffRLError(f"{parent}: no whole checkpoint in it; train again under another name.")

    def _claims(self) -> dict[str, Any]:
        """Return what is true of the state as it lies here, to be held against a checkpoint's manifest."""
        trained = [*self.policy.lora_parameters(), *self.policy.embedding_parameters()]
        fixed = self.reward.state_dict().values() if isinstance(self.reward, LogLikelihood) else []
        rate = self.config.algo.rate(self.update)
        return {
            "update": self.update,
            "learning rates": [base * rate for base in self.rates],
            "hash of the adapters": checkpoint.digest(trained),
            "prompts": self.setup.prompts,  # all that older runs claim of them
            "prompts and labels": _with_labels(self.setup.prompts),
            "evaluation prompts and labels": _with_labels(self.setup.eval_prompts),
            "hash of the data set": self.data,
            "hash of the classifier": checkpoint.digest(fixed),
        }

    def _take_up(self, folder: Path, stored: checkpoint.Checkpoint) -> None:
        tensors, state = stored.tensors, stored.state
        for number, parameter in enumerate(self.parameters):
            found, own = tensors.get(f"policy.{number}", torch.empty(0)).shape, parameter.shape
            if found != own or f"policy.{len(self.parameters)}" in tensors:
                raise DiffRLError(
                    f"{folder}: trained tensor {number} has shape {list(found)}, the policy's {list(own)}; "
                    f"it has {len(self.parameters)} in all. Was {CONFIG_FILE} changed by hand?"
                )
        if self.surrogate is not None:
            known = self.surrogate.state_dict()
            self.surrogate.load_state_dict({name: tensors.pop(f"reward.{name}") for name in known})
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                kind, index, *moment = name.split(".")
                if kind == "optimizer":
                    moments.setdefault(int(index), {})[moment[0]] = tensor
                else:
                    kept: Sequence[Tensor] = self.parameters if kind == "policy" else self.average.means
                    kept[int(index)].copy_(tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.config.algo.load_state_dict(state["algorithm"])
        self.average.count, self.skipped = state["averaged"], state["skipped"]
        self.update, self.log_size, self.spent = state["update"], state["log_size"], state["spent"]
        self.done = state["done"]
        self.guards.load_state_dict(state["guards"])
        if self.guards.best is not None and not (self.folder / weights.LORA_FILE).is_file():
            console.print(
                f"[bold yellow]{self.folder}[/]: the best weights so far are gone; others will do."
            )
            self.guards.best = None
        changed = settings_file.changed(state.get("settings", self.facts), self.facts)
        for name, (then, now) in changed.items():
            if name.endswith("chosen_by"):  # a fault in it may be what stopped the run
                console.print(
                    f"[bold yellow]{folder}[/]: your own file was edited since; it goes on with it."
                )
            elif not _moved(then, now):
                raise DiffRLError(
                    f"{folder}: {name} was {then} when it was saved, and is {now} now, in {CONFIG_FILE}. "
                    "Put it back, or train under another name."
                )
        claims = self._claims()
        for name, then in stored.claims.items():
            if claims[name] != then:
                raise DiffRLError(
                    f"{folder}: {name} after loading: {claims[name]}, and when it was saved: {then}. Was "
                    "a file of the run, or one that its settings name, changed by hand?"
                )

    def _evaluate(self, log: RunLog, *, last: bool = False) -> None:
        if processes.is_first():
            with memory.told(AT_A_TIME[1], self.config.eval_batch, self.folder):
                measures = self._measure(log, last=last)
            warning, new = self.guards.judge(self.update, measures, last=last)
            if new:
                console.print(f"[bold yellow]update {self.update}[/]: {warning}")
            told: dict[str, Any] = {"guard/warning": warning} if warning else {}
            if last and self.guards.best is not None:
                told["guard/best_update"] = self.guards.best_update
            log.write(self.update, measures | told | self.spent)
            if self.guards.keeps(self.update):
                weights.save(self.policy, self.folder)  # a killed run keeps what was measured here
        self.guards.load_state_dict(processes.gathered([self.guards.state_dict()])[0])  # the first one's

    def _measure(self, log: RunLog, *, last: bool) -> dict[str, Any]:
        """Return what the policy is like now; the last time of more pictures. Draw and print it as well.

        The last time its weights are those that the run keeps.
        """
        update, config = self.update, self.config
        if self.mixture is not None:
            return self.mixture.report(update, log)
        num_pictures = config.eval_pictures * (4 if last else 1)
        seed = EVALUATION_SEED + config.seed  # over seeds, an untrained row varies too
        measures = measure(self.setup, self.policy, self.reward, num_pictures, seed)
        for scale in config.eval_scales if last else ():
            self.policy.control_scale = scale
            scaled = measure(self.setup, self.policy, self.reward, num_pictures, seed)
            self.policy.control_scale = 1.0
            measures |= {f"scale_{scale:g}/{name}": value for name, value in scaled.items()}
        actor = self.setup.make_guided(self.policy, self.reward, GRID_COLUMNS)
        picture = picture_grid(actor, self.setup.eval_prompts)
        path = log.picture(update, "grid", picture)
        said = [f"reward {measures['reward_mean']:.3f}"]
        said += [f"accuracy {measures['accuracy']:.2f}"] if "accuracy" in measures else []
        said += [] if measures["kl_nats"] is None else [f"KL {measures['kl_nats']:.1f} nats"]
        console.print(f"update {update}: {', '.join(said)}, {path}")
        return {f"eval/{name}": value for name, value in measures.items()}


def _moved(then: Any, now: Any) -> bool:
    """Return whether two settings name files that are called alike; what counts of them is claimed."""
    return isinstance(then, str) and isinstance(now, str) and Path(then).name == Path(now).name


def _with_labels(prompts: Sequence[str]) -> list[list[Any]]:
    """Return each prompt with the label that it comes with, in JSON's types."""
    return [[prompt, *getattr(prompt, "label", ())] for prompt in prompts]


def _note(metrics: dict[str, float]) -> str:
    shown = {"reward_mean": "reward", "kl": "KL", "objective": "J", "accuracy": "accuracy"}
    known = {word: metrics.get(f"rollout/{name}") for name, word in shown.items()}
    return "  ".join(f"{word} {value:.2f}" for word, value in known.items() if value is not None)
