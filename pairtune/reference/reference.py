"""The reference of one run: whatever the config asks for, behind one object that a recipe holds.

The recipe says when: `build` and `open_cache` before any weight is read, `alone` and `attach` around the loading of the
policy, `follow` before each step, `logps` for each batch. Where the values come from is in sources.py and cache.py.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pairtune import models
from pairtune.errors import UserError
from pairtune.folders import peft
from pairtune.folders.weights import ModelFolder
from pairtune.losses.calling import needs
from pairtune.models.divergence import token_divergence
from pairtune.models.logps import answer_logps, answer_token_logps
from pairtune.models.sharing import SOME
from pairtune.pairs.batch import PairBatch
from pairtune.pairs.digests import digest_pair
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World
from pairtune.reference import cache
from pairtune.reference.sources import (
    AdapterCopy,
    AdaptersOff,
    AsItStarts,
    FrozenModel,
    SecondModel,
    check_reference,
    has_second_model,
    is_own,
    open_second_model,
)

KL_PAIRS = 64  # held-out ones along whose answers `divergence` is asked for: some thousand tokens tell it well
NUM_COMPARED = 16  # values of earlier runs that are computed again, to notice a reference that has changed


class Reference:
    """What the policy is compared with: gives log-probabilities of the answers in a batch, see `logps`.

    Attributes:
        copies_adapters: Whether the policy has to be built with room for a frozen copy of its adapters.
        is_start: Whether it has the weights that the run starts from: before the first update, policy and reference
            give the same log-probabilities, but for dropout.
        was_asked: Whether `logps` was called where gradients are taken: by a loop, not by a step's first pass.
    """

    def __init__(
        self,
        block: Mapping,
        method: str,
        loss_fn: Callable,
        *,
        dtype: str,
        adapter: str | None = None,
        world: World | None = None,
    ):
        """
        Args:
            block: The config's `reference`.
            method: full, lora or qlora.
            loss_fn: Says whether it has a reference, and how its log-probabilities are summed.
            dtype: The run's, bf16 or fp32.
            adapter: The folder of the adapter that the run starts from.
            world: The processes that share it; only its log-probabilities need one.

        Raises:
            UserError: The recipe or the loss does not have this reference, see sources.check_reference.
        """
        check_reference(block, loss_fn, method, dtype=dtype, has_adapter=adapter is not None)
        self._block, self._method, self._dtype = block, method, dtype
        self._adapter, self._world = adapter, world
        self._is_used, self._ld_alpha = needs(loss_fn).reference, needs(loss_fn).ld_alpha
        self._is_own = is_own(block, method, dtype)
        self.copies_adapters = method != "full" and block["name"] in ("start", "sync")
        self.is_start = self._is_used and self._is_own and block["name"] != "none"
        self._every_n_steps = block["every_n_steps"] if block["name"] == "sync" else None
        self._second: FrozenModel | None = None
        self._cache: cache.ReferenceCache | None = None
        self._live = None  # of sources.py: what computes values
        self._policy: nn.Module | None = None
        self._some: list[Pair] = []  # by which a second model is settled
        self.was_asked = False
        self._remembers, self._remembered = False, {}  # [P] values by a micro-batch's pairs
        self._first_pass, self._is_asked_again = [], False  # batches and values of a step's first pass; see `logps`
        self._keep: Callable | None = None  # takes the values of what `unanswered` has yielded

    # Before any weight is read

    def build(self, component: Mapping, files: ModelFolder, tokenizer, max_length: int) -> None:
        """Builds a second model on the meta device, if there is one, and compares it with its folder.

        Args:
            component: The run's `model` block.
            files: The run's, from weights.open_weights.
            tokenizer: The run's, from tokenizer.adapt.
            max_length: Tokens of the longest conversation.

        Raises:
            UserError: See sources.open_second_model.
        """
        self._component, self._files = component, files
        if self._is_used and has_second_model(self._block, self._method, self._dtype):
            self._second = open_second_model(
                self._block,
                self._method,
                component=component,
                dtype=self._dtype,
                files=files,
                tokenizer=tokenizer,
                world=self._world,
            )
            self._second.make_ready(max_length, tokenizer.vocab_size)

    @property
    def second(self) -> nn.Module | None:
        """A second model; None without one, and with a cache, when its values are there."""
        return self._second.model if self._second else None

    @property
    def computes(self) -> bool:
        """Whether `logps` runs a model now, not a cache."""
        return self._cache is None

    @property
    def second_stays(self) -> bool:
        """Whether a second model is in memory while the policy is trained."""
        return self._second is not None and self._block["name"] != "cached"

    @property
    def files(self) -> ModelFolder | None:
        """The folder of a second model; None without one."""
        return self._second.files if self._second else None

    @property
    def num_parameters(self) -> int:
        """How many parameters a second model has; 0 without one."""
        return models.num_parameters(self._second.model)[0] if self._second else 0

    def check_moves(self, total_steps: int) -> None:
        """Refuses a reference that is to be moved toward the policy, and never would be (TR-DPO).

        Raises:
            UserError: As said.
        """
        every = self._every_n_steps
        if every is not None and every >= total_steps:
            raise UserError(
                f"reference.every_n_steps={every}: the run has {total_steps} steps, and a move is before a step: the "
                f"reference would never move; nearest valid: reference.every_n_steps={max(1, total_steps - 1)}, or "
                "another reference"
            )

    # reference=cached

    def open_cache(self, policy: nn.Module, pairs: Sequence[Pair], *, score_end: bool = True) -> None:
        """Finds what earlier runs have kept of these pairs, if the reference is cached.

        Args:
            policy: On the meta device, or loaded.
            pairs: All that `logps` will be asked about.
            score_end: As for batch.lay_out.

        Raises:
            UserError: See cache.ReferenceCache.
        """
        self._some = list(pairs[:SOME])
        if self._block["name"] != "cached":
            return
        folder = cache.find_folder(self._block["cache_dir"])
        source = {"component": self._component, "weight_files": self._files.weight_files}
        if self._adapter:
            source["adapter_files"] = [peft.find_weights(self._adapter)]
        identity = cache.identify(
            folder,
            self._second.model if self._second else policy,
            self._world,
            **(self._second.source if self._second else source),
            ld_alpha=self._ld_alpha,
            score_end=score_end,
        )
        self._cache = cache.ReferenceCache(folder, identity, pairs, self._world)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts, a second model that has values to add to the cache is in memory; it leaves at the end.

        So no two models are held at a time, if the policy is loaded afterwards.
        """
        if not (self._cache and self._second):
            yield
            return
        if self._cache.missing:
            self._load_second()
            self._live = SecondModel(None, self._second.model)
            yield
        else:
            self._world.print(
                f"reference: the cache has all {len(self._cache):,} values; its model is not loaded to check them\n"
            )
            yield
        self._live = self._second = None
        gc.collect()  # a model and the functions that it was given refer to each other

    def unanswered(self, share: Callable) -> Iterator[list[Pair]]:
        """Yields micro-batches, this process's, whose values the cache wants: lay each out and pass it to `keep`.

        A few that earlier runs have kept come first and are compared; then those that are missing, in larger batches,
        since there are no gradients. Nothing unless the reference is cached and can compute now.

        Args:
            share: The run's Steps.share.
        """
        if self._cache is None or self._live is None:
            return
        self._keep = self._cache.check
        yield from share(self._cache.samples(NUM_COMPARED))
        self._keep = self._cache.put
        for pairs in self._world.progress(share(self._cache.missing, cache.BATCHES), "reference"):
            self._world.beat("reference")
            yield pairs
        self._cache.complete()
        if self._policy is not None:  # shards again, which a checkpoint is loaded into
            models.forget_gathered(self._policy)

    def keep(self, batch: PairBatch) -> None:
        """Computes the values of a micro-batch of `unanswered`, by a forward, and puts them into the cache.

        Raises:
            UserError: A value is not finite, or not what an earlier run has kept, or the disk cannot be written.
        """
        self._keep(batch.pairs, *self._live_logps(batch))

    # While the run lasts

    def attach(self, policy: nn.Module) -> None:
        """Becomes able to compute: the policy is loaded, a second model is loaded now.

        Call it before the first forward: FSDP2 shows a model's shards until then.
        """
        self._policy = policy
        if self._second:
            self._load_second()
            self._live = SecondModel(policy, self._second.model)
        elif self._cache and not self._is_own:
            self._live = None  # its model has been and gone; the policy is another one
        elif self.copies_adapters:
            self._live = AdapterCopy(policy)
        elif self._adapter or self._method == "full":
            self._live = AsItStarts(policy)
        else:
            self._live = AdaptersOff(policy)

    def _load_second(self) -> None:
        self._second.load(self._world)
        models.settle(self._second.model, self._some, self._world)

    def _live_logps(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        with self._live.weights() as model:
            return answer_logps(model, batch, self._ld_alpha)

    def logps(self, batch: PairBatch, *, first_pass: bool = False) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Returns chosen and rejected log-probabilities, [P] each in nats: from the cache, or by a forward.

        None for a loss without a reference; zeros with reference=none, to which every answer is alike.

        Args:
            first_pass: The values are kept for the next time that they are asked for, in the same step.
        """
        self.was_asked |= torch.is_grad_enabled()
        if not self._is_used:
            return None, None
        if self._cache:
            return self._cache(batch.pairs)
        if self._block["name"] == "none":
            return torch.zeros(2, batch.num_pairs, device=self._world.device).unbind()
        if self._remembers:
            return self._remember(batch)
        if first_pass and self._is_asked_again:
            self._first_pass = []  # of the step before
        self._is_asked_again = not first_pass
        for other, values in self._first_pass:
            if other.pairs is batch.pairs and other.answer_lengths == batch.answer_lengths:
                return values
        values = self._live_logps(batch)
        if first_pass:
            self._first_pass.append((batch, values))
        return values

    def divergence(self, policy: nn.Module, batch: PairBatch) -> Tensor:
        """Returns how far the policy is from the reference at each scored position, see models/divergence.py.

        Nothing, [0], where there is no reference, or its values alone are there: with a cache.
        """
        if not self._is_used or self._cache or self._block["name"] == "none":
            return torch.zeros(0, device=self._world.device)

        def token_logps(drawn: PairBatch) -> Tensor:
            with self._live.weights() as model:
                return answer_token_logps(model, drawn)

        return token_divergence(policy, token_logps, batch)

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """While it lasts, what is asked for a second time, in the same micro-batch, is not computed again.

        For evaluations: the values of held-out pairs are those of the first one, until the reference moves.
        """
        self._remembers = True
        try:
            yield
        finally:
            self._remembers = False

    def _remember(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        key = b"".join(map(digest_pair, batch.pairs))
        if self._world.max_number(int(key not in self._remembered)):  # a sharded model runs in all processes or in none
            self._remembered[key] = self._live_logps(batch)
        return self._remembered[key]

    def follow(self, step: int) -> None:
        """Moves toward the policy if it is time to: after every `every_n_steps` steps, before the one that follows.

        So the evaluation of the step before is against the reference that this step had.
        """
        if self._every_n_steps and step > 1 and (step - 1) % self._every_n_steps == 0:
            self._live.move(self._block["alpha"])
            self._remembered.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Returns this process's parts of what moves, by their names in a checkpoint; nothing if nothing moves."""
        return self._live.tensors() if self._every_n_steps else {}
