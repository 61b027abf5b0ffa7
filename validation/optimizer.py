"""The optimizer that replay steps with: torch's fused one, over real views of complex parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hardware_models.errors import UnknownNameError


class FusedOptimizer:
    """AdamW or SGD in fused kernels that make no temporaries.

    torch's fused kernels take no complex parameters; an elementwise step on a complex number is the step on its two real parts, so
    those parameters enter as ``torch.view_as_real`` views.

    Raises:
        UnknownNameError: a name other than ``adamw`` and ``sgd``.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, name: str = "adamw", learning_rate: float = 1e-4) -> None:
        known = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        if name not in known:
            raise UnknownNameError(source="plan", key="precision.optimizer", value=name, known=tuple(known))
        self.name, self._learning_rate = name, learning_rate
        self.loss_scale = 1.0
        """Of the loss whose gradients it is given: it scales them back, and does nothing where one is not finite (as ``torch.amp.GradScaler`` has it)."""
        self.agree: Callable[[torch.Tensor], None] | None = None
        """Makes a flag that is above 0 on any rank so on all: none updates where one cannot. Called in every step with a scaled loss, whatever there is to update."""
        self.device = torch.device("cpu")
        """Of the flag where there is nothing to update."""
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._views = [
            torch.nn.Parameter(torch.view_as_real(parameter.detach())) if parameter.is_complex() else parameter
            for parameter in self.parameters
        ]
        self._optimizer = known[name](self._views, lr=learning_rate, fused=True) if self._views else None

    def like(self, parameters: Iterable[torch.nn.Parameter]) -> FusedOptimizer:
        """The same kind of optimizer of other parameters."""
        found = FusedOptimizer(parameters, name=self.name, learning_rate=self._learning_rate)
        found.loss_scale = self.loss_scale
        return found

    def step(self) -> None:
        """One step with the gradients in ``.grad``, which are let go."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if view is not parameter and parameter.grad is not None:
                view.grad = torch.view_as_real(parameter.grad)
        if self.loss_scale != 1.0:
            self._scale_back()
        if self._optimizer is None:
            return
        self._optimizer.step()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view.grad = None

    def _scale_back(self) -> None:
        grads = [view.grad for view in self._views if view.grad is not None]
        found_inf = torch.zeros((), device=grads[0].device if grads else self.device)
        if grads:
            inverse = torch.full((), 1.0 / self.loss_scale, device=found_inf.device)
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inverse)
        if self.agree is not None:
            self.agree(found_inf)
        if self._optimizer is not None:
            self._optimizer.found_inf = found_inf  # the fused kernels read it

    @property
    def state_tensors(self) -> list[torch.Tensor]:
        """Tensors that the optimizer keeps between steps."""
        states = [] if self._optimizer is None else self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]

    def forget_states(self) -> None:
        """Lets the states go; the next step makes them anew."""
        if self._optimizer is not None:
            self._optimizer.state.clear()
