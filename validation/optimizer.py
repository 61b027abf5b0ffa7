"""The optimizer that replay steps with: torch's fused one, over real views of complex parameters."""

from __future__ import annotations

from collections.abc import Iterable

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
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._views = [
            torch.nn.Parameter(torch.view_as_real(parameter.detach())) if parameter.is_complex() else parameter
            for parameter in self.parameters
        ]
        self._optimizer = known[name](self._views, lr=learning_rate, fused=True) if self._views else None

    def like(self, parameters: Iterable[torch.nn.Parameter]) -> FusedOptimizer:
        """The same kind of optimizer of other parameters."""
        return FusedOptimizer(parameters, name=self.name, learning_rate=self._learning_rate)

    def step(self) -> None:
        """One step with the gradients in ``.grad``, which are let go."""
        if self._optimizer is None:
            return
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if view is not parameter and parameter.grad is not None:
                view.grad = torch.view_as_real(parameter.grad)
        self._optimizer.step()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view.grad = None

    @property
    def state_tensors(self) -> list[torch.Tensor]:
        """Tensors that the optimizer keeps between steps."""
        states = [] if self._optimizer is None else self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]

    def forget_states(self) -> None:
        """Lets the states go; the next step makes them anew."""
        if self._optimizer is not None:
            self._optimizer.state.clear()
