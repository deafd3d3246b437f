"""PEFT's rank allocation and penalty of AdaLoRA, in a few batched kernels."""

from collections.abc import Iterable

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.layer import RankAllocator as PeftRankAllocator


class RankAllocator(PeftRankAllocator):
    """PEFT's allocator with the same results, in a few kernels a step instead of thousands.

    PEFT walks every parameter of the model at each update; here the factors are listed once, and handled through
    `torch._foreach_*` and one stacked tensor a shape.

    step: optimizer steps allocated so far.
    budget: triplets kept at present.
    log: one `(step, importance)` an allocation, the importance summed over the triplets of each layer.
    settled: the ranks are those of a saved adapter that is taken up again, and stay.
    """

    def __init__(self, model: torch.nn.Module, config: AdaLoraConfig, adapter_name: str) -> None:
        super().__init__(model, config, adapter_name)
        named = dict(model.named_parameters())
        self.params = [named[name % factor] for factor in ("lora_A", "lora_B", "lora_E") for name in self.name_set]
        self.layers = len(self.name_set)
        self.E = self.params[2 * self.layers :]
        self.groups = {}  # (rank axis, shape) -> where the A (rank axis 0) or B (1) of that shape stand in params
        for index, param in enumerate(self.params[: 2 * self.layers]):
            self.groups.setdefault((index // self.layers, param.shape), []).append(index)
        self.step, self.budget, self.log, self.masks = 0, self.init_bgt, [], None
        self.settled = False
        if config.rank_pattern:  # PeftModel.from_pretrained has cut the factors to it
            self.settle(config.rank_pattern)

    def settle(self, rank_pattern: dict[str, list[bool]]) -> None:
        """Keep the ranks of an adapter that was trained before, through a run with steps of its own."""
        names = (name % "lora_E" for name in self.name_set)
        saved = {self.short(name): kept for name, kept in rank_pattern.items()}
        self.peft_config.rank_pattern = {name: saved[self.short(name)] for name in names}
        self.settled, self.step, self.masks = True, 0, None
        self.budget = sum(map(sum, self.peft_config.rank_pattern.values()))
        self.reset_ipt()

    def short(self, name: str) -> str:
        """A name of a rank pattern as it is saved, without the adapter's."""
        return name.removesuffix(f".{self.adapter_name}")

    @property
    def last(self) -> int:
        """The step whose allocation is the last; -1 where all were made before."""
        return -1 if self.settled else self.peft_config.total_step - self.peft_config.tfinal

    @property
    def final(self) -> bool:
        """Whether the ranks are as they will stay."""
        return self.step > self.last

    @property
    def scoring(self) -> bool:
        """Whether the gradients of this step go into the importance: not those of the last allocation's, in PEFT."""
        return self.step < self.last

    def allocate(self) -> None:
        """End a step: PEFT's AdaLoraModel.update_and_allocate, but for update_ipt, which comes before if `scoring`."""
        budget, due = self.budget_schedule(self.step)
        if self.final:
            self.mask_using_rank_pattern(None, self.peft_config.rank_pattern)
        elif due or self.step == self.last:
            self.peft_config.rank_pattern = self.mask_to_budget(None, budget)
        if self.step == self.last:
            self.reset_ipt()
        self.step += 1

    @torch.no_grad()
    def penalty(self, add_gradients: bool) -> torch.Tensor:
        """PEFT's orthogonality penalty, float32 (): orth_reg_weight x the mean of |A·Aᵀ - I| and |Bᵀ·B - I|.

        `add_gradients` adds its derivative to each factor's `.grad`, in closed form: it is no part of the graph.
        """
        total = torch.zeros((), device=self.E[0].device)
        weight = self.peft_config.orth_reg_weight / (2 * self.layers)
        for (rank_axis, _), indices in self.groups.items():
            P = torch.stack([self.params[i] for i in indices])
            P = P.mT if rank_axis else P
            excess = P @ P.mT - torch.eye(P.shape[1], device=P.device)
            norms = excess.norm(dim=(1, 2), keepdim=True)
            total += norms.sum()
            if add_gradients:
                slope = (2 * weight * excess / norms.clamp_min(1e-12)) @ P
                slope = slope.mT if rank_axis else slope
                torch._foreach_add_([self.params[i].grad for i in indices], list(slope.unbind()))
        return weight * total

    def state_dict(self) -> dict:
        """What a resumed run needs, tensors and plain values."""
        names = ("step", "budget", "log", "settled", "exp_avg_ipt", "exp_avg_unc")
        return {name: getattr(self, name) for name in names} | {"rank_pattern": self.peft_config.rank_pattern}

    def load_state_dict(self, state: dict) -> None:
        """Back to a state of `state_dict`, on the devices of the factors."""
        self.step, self.budget, self.log = state["step"], state["budget"], state["log"]
        self.settled = state.get("settled", False)
        for name in ("exp_avg_ipt", "exp_avg_unc"):
            setattr(self, name, [average.to(param.device) for average, param in zip(state[name], self.params)])
        self.peft_config.rank_pattern, self.masks = state["rank_pattern"], None

    def reset_ipt(self) -> None:
        """Forget the importance: no allocation comes any more."""
        self.exp_avg_ipt, self.exp_avg_unc = [], []

    @torch.no_grad()
    def update_ipt(self, model: torch.nn.Module | None) -> None:
        """Smooth the sensitivity |p·grad| and its uncertainty, for every entry of every factor."""
        if not self.exp_avg_ipt:
            self.exp_avg_ipt = [torch.zeros_like(param) for param in self.params]
            self.exp_avg_unc = [torch.zeros_like(param) for param in self.params]
        ipt = torch._foreach_mul(self.params, [param.grad for param in self.params])
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(self.exp_avg_ipt, ipt, 1 - self.beta1)
        torch._foreach_sub_(ipt, self.exp_avg_ipt)
        torch._foreach_abs_(ipt)
        torch._foreach_lerp_(self.exp_avg_unc, ipt, 1 - self.beta2)

    def importance(self) -> torch.Tensor:
        """The importance of every triplet, float32 (layers, init_r), layers in the order of `name_set`."""

        def score(indices: Iterable[int]) -> torch.Tensor:
            ipt, unc = (torch.stack([avg[i] for i in indices]) for avg in (self.exp_avg_ipt, self.exp_avg_unc))
            return ipt * unc

        total = score(range(2 * self.layers, 3 * self.layers)).squeeze(-1)
        for (rank_axis, _), indices in self.groups.items():
            total[[i % self.layers for i in indices]] += score(indices).mean(dim=1 if rank_axis else 2)
        return total

    @torch.no_grad()
    def mask_to_budget(self, model: torch.nn.Module | None, budget: int) -> dict[str, list[bool]]:
        """Zero the E of all but the `budget` most important triplets; returns PEFT's rank pattern."""
        importance = self.importance()
        keep = importance > importance.flatten().kthvalue(self.init_bgt - budget).values
        self._mask(list(keep))
        self.budget = int(keep.sum())
        self.log.append((self.step, importance.sum(dim=1).tolist()))
        return {name % "lora_E": kept for name, kept in zip(self.name_set, keep.tolist())}

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: torch.nn.Module | None, rank_pattern: dict[str, list[bool]]) -> None:
        """Zero the E of the triplets that the pattern, or the last allocation, let go."""
        if self.masks is None:  # a resumed run whose ranks are final, or an adapter taken up again
            kept = [
                torch.tensor(rank_pattern[name % "lora_E"], device=E.device) for name, E in zip(self.name_set, self.E)
            ]
            self._mask([mask[mask] if len(E) < len(mask) else mask for mask, E in zip(kept, self.E)])
        else:
            torch._foreach_mul_(self.E, self.masks)

    def _mask(self, keep: list[torch.Tensor]) -> None:
        self.masks = [kept.unsqueeze(-1).to(self.E[0].dtype) for kept in keep]
        torch._foreach_mul_(self.E, self.masks)


def rank_allocator(model: torch.nn.Module) -> RankAllocator | None:
    """The allocator of an AdaLoRA model, made batched on the first call; None for any other model."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        return None
    if not isinstance(tuner.rankallocator, RankAllocator):
        name = tuner.trainable_adapter_name
        for layer in tuner.model.modules():
            if isinstance(layer, AdaLoraLayer):  # PEFT 0.21 makes this constant trainable where the base is 16-bit
                layer.ranknum[name].requires_grad_(False)
        tuner.rankallocator = RankAllocator(tuner.model, tuner.peft_config[name], name)
    return tuner.rankallocator
