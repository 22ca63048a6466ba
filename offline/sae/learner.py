"""One dictionary while it is trained: weights, optimiser, and who has not fired for long."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offline.sae.choose import encoder_dtype
from offline.sae.dictionary import Dictionary
from offline.sae.group import Group
from offline.sae.schedule import learning_rate, warm_up
from offline.sae.settings import Reading, SaeSettings
from offline.sae.step import Outcome, Parameters, gradients

_THRESHOLD_MEMORY = 0.99
"""Of the running mean of batchtopk's threshold: about the last hundred batches."""


class Learner:
    """Trains one dictionary, step by step.

    Parameters
    ----------
    settings
        Of the dictionary.
    mean
        Of the vectors, ``[C]``, in units of their root mean square norm.
    vectors
        How many there are.
    reading
        How they are read.
    group
        The devices that share every batch.
    """

    def __init__(self, settings: SaeSettings, mean: Tensor, vectors: int, reading: Reading, group: Group) -> None:
        self.settings = settings
        self.sums = torch.zeros(4, dtype=torch.float64, device=group.device)
        """Squared error, active pairs, loss times vectors, and gradient norms, since ``forget``."""
        self._reading = reading
        self._steps_per_epoch = reading.steps_per_epoch(vectors)
        self._group = group
        self._dtype = encoder_dtype(settings, group.device)
        self._parameters = {name: value.to(group.device) for name, value in _start(settings, mean).items()}
        self._optimiser = torch.optim.Adam(list(self._parameters.values()), lr=settings.learning_rate, fused=True)
        self._step = 0
        self._silence = torch.zeros(settings.latents, dtype=torch.int64, device=group.device)
        """Vectors since each latent fired."""
        self._dead_after = settings.dead_after_epochs * vectors
        self._threshold = torch.zeros(2, dtype=torch.float64, device=group.device)
        """batchtopk: decaying sum of thresholds, and of their weights."""

    @torch.no_grad()
    def step(self, vectors: Tensor, batch_size: int) -> None:
        """Learn from this device's part of a batch ``[n, C]``, scaled to a mean square norm of one."""
        settings = self.settings
        price = settings.sparsity_coefficient if settings.variant == "jumprelu" else 0.0
        price *= warm_up(self._step, self._steps_per_epoch, settings.sparsity_warm_up_epochs)
        outcome = gradients(
            vectors,
            self._parameters,
            settings,
            self._dead(),
            batch_size=batch_size,
            sparsity_coefficient=price,
            dtype=self._dtype,
            total=self._group.total,
        )
        norm = self._descend(outcome.gradients)
        self._observe(outcome, norm, batch_size, price)
        self._step += 1

    def dead_share(self) -> float:
        """Return the share of latents that have not fired for long."""
        return float((self._silence >= self._dead_after).double().mean())

    def forget(self) -> None:
        """Begin the sums anew."""
        self.sums.zero_()

    def dictionary(self, scale: float) -> Dictionary:
        """Return the dictionary for vectors ``scale`` times as long as those learned from."""
        values = {name: tensor.detach().cpu().clone() for name, tensor in self._parameters.items()}
        for name in ("encoder_bias", "decoder_bias"):
            if name in values:
                values[name] *= scale
        k: int | None = self.settings.k
        if "log_threshold" in values:
            k, values["threshold"] = None, values.pop("log_threshold").exp() * scale
        elif self.settings.variant == "batchtopk":
            total, weight = self._threshold.tolist()
            k, values["threshold"] = None, torch.full((self.settings.latents,), scale * total / max(weight, 1e-12))
        return Dictionary(**values, k=k)

    def state(self) -> dict[str, Tensor]:
        """Return all that a training goes on from, by name."""
        state = {"silence": self._silence, "threshold": self._threshold, "sums": self.sums}
        for name, parameter in self._parameters.items():
            state[f"weights/{name}"] = parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}/{name}"] = self._optimiser.state[parameter].get(moment, torch.zeros_like(parameter))
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Go on after so many steps from what ``state`` returned then."""
        for name, own in (("silence", self._silence), ("threshold", self._threshold), ("sums", self.sums)):
            own.copy_(state[name])
        for name, parameter in self._parameters.items():
            parameter.copy_(state[f"weights/{name}"])
            moments = {m: state[f"{m}/{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
            self._optimiser.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
        self._step = step

    def _dead(self) -> Tensor:
        """Return the dead latents; the device is asked, and waited for, only once there can be any."""
        if self._step * self._reading.batch_size < self._dead_after:
            return torch.empty(0, dtype=torch.int64, device=self._group.device)
        return (self._silence >= self._dead_after).nonzero().squeeze(1)

    def _descend(self, found: Parameters) -> Tensor:
        """Take one step against the gradients, and return their norm."""
        decoder = self._parameters["decoder"]
        for name, parameter in self._parameters.items():
            parameter.grad = self._group.total(found[name])
        remove_parallel(found["decoder"], decoder)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.settings.gradient_norm)
        self._optimiser.param_groups[0]["lr"] = learning_rate(
            self.settings, self._step, self._steps_per_epoch, self._reading.epochs
        )
        self._optimiser.step()
        self._optimiser.zero_grad()
        normalise_rows(decoder)
        return norm

    def _observe(self, outcome: Outcome, norm: Tensor, batch_size: int, price: float) -> None:
        """Count who fired, and add to the sums."""
        fires = torch.isfinite(outcome.smallest)
        counts = torch.cat(
            [
                outcome.fired.double(),
                torch.stack(
                    [
                        outcome.squared_error,
                        outcome.active.double(),
                        outcome.auxiliary,
                        torch.where(fires, outcome.smallest, 0).double(),
                        fires.double(),
                    ]
                ),
            ]
        )
        fired, rest = self._group.total(counts).split([len(self._silence), 5])
        error, active, auxiliary, smallest, firing = rest.unbind()
        self._silence = torch.where(fired > 0, 0, self._silence + batch_size)
        loss = error + self.settings.auxk_coefficient * auxiliary * batch_size + price * active
        self.sums += torch.stack([error, active, loss, norm.double()])
        seen = torch.stack([smallest / firing.clamp_min(1), torch.ones_like(firing)])
        self._threshold = torch.where(
            firing > 0, _THRESHOLD_MEMORY * self._threshold + (1 - _THRESHOLD_MEMORY) * seen, self._threshold
        )


def remove_parallel(gradient: Tensor, rows: Tensor) -> None:
    """Take from each row of a gradient what points along the unit row: it would only change its length."""
    along = torch.einsum("kc,kc->k", gradient, rows)
    gradient.addcmul_(along.unsqueeze(1), rows, value=-1)


def normalise_rows(table: Tensor) -> None:
    """Scale every row to unit length."""
    table.div_(torch.linalg.vector_norm(table, dim=1, keepdim=True))


def _start(settings: SaeSettings, mean: Tensor) -> Parameters:
    """Return the first parameters: the same random unit rows for encoder and decoder."""
    channels, latents = len(mean), settings.latents
    # Drawn on the CPU, so that a seed gives the same weights on every device.
    rows = torch.randn(latents, channels, generator=torch.Generator().manual_seed(settings.seed))
    normalise_rows(rows)
    parameters = {"encoder": rows, "decoder": rows.clone()}
    if settings.encoder_bias:
        parameters["encoder_bias"] = torch.zeros(latents)
    if settings.decoder_bias:
        parameters["decoder_bias"] = mean.float()
    if settings.variant == "jumprelu":
        # Before random unit rows, a vector's pre-activations are normal with variance ‖a‖² / C: k are above this.
        square = 1 - float(mean.square().sum()) if settings.decoder_bias else 1.0
        above = float(torch.special.ndtri(torch.tensor(1 - settings.k / settings.latents, dtype=torch.float64)))
        threshold = max(above * math.sqrt(square / channels), settings.bandwidth)
        parameters["log_threshold"] = torch.full((latents,), math.log(threshold))
    return parameters
