"""A model cut at its output layer: the hidden states that go into it, and the logits that the architecture makes of its products.

Promise: both are the work of the architecture's own forward pass, scales before the layer and soft caps, scales and cut vocabularies after it
included, so that no architecture is known here by name; one whose forward pass cannot be cut so is refused. Neither part computes
the layer itself, whose `[tokens, vocab]` products are made a chunk at a time elsewhere.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maspo_ray.errors import ConfigError
from maspo_ray.objectives.tensor_ops import LogitTransform


class OutputLayer:
    """A model's output layer, and its forward pass on either side of it.

    Attributes:
        transform: [tokens, rows] products of the layer → [tokens, vocab] logits; None where these are the logits already.

    Raises:
        ConfigError: the model has no linear output layer, or its forward pass makes logits of something else.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._taker = _Taker(self.linear)
        names = [name for name, child in model.named_children() if child is self.linear]
        if not names:
            raise self._refusal("its output layer is inside another of its modules")
        # Of the model itself, whose own modules stay where they are: a copy whose children are the same but for the output layer.
        self._body = _with_children(model, {names[0]: self._taker})
        self._giver = _Giver(self.linear)
        others = {name: _Nothing(child) for name, child in model.named_children()}
        self._rest = _with_children(model, {**others, names[0]: self._giver})
        self.transform: LogitTransform | None = self._transformed if self._changes_logits() else None

    @property
    def linear(self) -> torch.nn.Linear:
        """The layer; its parameters may be None's or a shard's outside of the engine's forward pass."""
        head = self._model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
            raise self._refusal(f"its output layer is {type(head).__name__}, and not linear")
        return head

    def hidden(self, **inputs: Any) -> Tensor:
        """Returns [1, tokens, d], what the architecture gives its output layer."""
        self._taker.taken = None
        self._body.forward(**inputs, use_cache=False)
        hidden, self._taker.taken = self._taker.taken, None
        if hidden is None:
            raise self._refusal("its forward pass makes logits without its output layer")
        return hidden

    def _transformed(self, products: Tensor) -> Tensor:
        self._giver.given = products[None]
        # Ids of the right number, which no module is left to read.
        ids = torch.zeros(1, len(products), dtype=torch.int64, device=products.device)
        logits: Tensor = self._rest.forward(input_ids=ids, use_cache=False).logits[0]
        self._giver.given = None
        return logits

    @torch.no_grad()
    def _changes_logits(self) -> bool:
        """Returns whether the architecture's logits are other than the layer's products, found on products of many sizes."""
        weight = self.linear.weight
        exponents = torch.arange(self.linear.out_features, device=weight.device) % 9 - 4
        signs = torch.tensor([[1.0], [-1.0]], device=weight.device)
        products = (signs * 2.0**exponents).to(weight.dtype)
        try:
            logits = self._transformed(products)
        except Exception as error:
            # Whatever its code raises here, it says that it needs more than the layer's products.
            raise self._refusal(f"its forward pass does more around its output layer ({error})") from error
        return logits.shape != products.shape or not torch.equal(logits.to(products.dtype), products)

    def _refusal(self, fault: str) -> ConfigError:
        return ConfigError(
            f"model.path is {self._model.name_or_path}; {type(self._model).__name__} cannot be trained here: {fault}. "
            "Take a model of another architecture."
        )


def _with_children(model: PreTrainedModel, children: dict[str, torch.nn.Module]) -> PreTrainedModel:
    """Returns a copy of the model that has the same parameters, config and modules, but for the named ones."""
    copied = copy.copy(model)
    copied._modules = {**model._modules, **children}
    return copied


class _StandIn(torch.nn.Module):
    """Stands for a module in a copy of its model: has its attributes, and another forward pass."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        # In a tuple, since its parameters are not to be found here.
        self._module = (module,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module[0], name)


class _Taker(_StandIn):
    """Keeps what the output layer is given."""

    taken: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.taken = hidden
        return hidden


class _Giver(_StandIn):
    """Returns what the output layer is said to have computed."""

    given: Tensor | None = None

    def forward(self, _hidden: Any) -> Tensor:
        assert self.given is not None, "the layer's products come first"
        return self.given


class _Nothing(_StandIn):
    """Computes nothing; its output has nothing but a place for hidden states, which nobody reads."""

    def forward(self, *_args: Any, **_inputs: Any) -> "_Empty":
        return _Empty()


class _Empty:
    """The output of a decoder that did not run."""

    last_hidden_state = torch.zeros(1, 1, 1)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return
