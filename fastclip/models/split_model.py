"""A Hugging Face language model cut in two: first layers frozen, last layers trained.

Every layer is wrapped in its place in the model's own list, and the model's own forward runs twice:
through the frozen layers, until their states reach the first trained one; and, given these states,
through the trained layers alone. Embeddings, positions, masks and the final norm stay the model's
business, whatever its family.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class _Pass:
    """What the layers do just now: without states the frozen ones run, with them the others."""

    states: Tensor | None = None
    real: Tensor | None = None


class _StatesReached(Exception):
    """Carries the frozen layers' states, (N, L, width), out of the model's forward."""


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module, under_way: _Pass) -> None:
        super().__init__()
        self.layer = layer
        self.under_way = under_way

    def __getattr__(self, name: str) -> Any:
        # some models ask their layers of what kind they are
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _FrozenLayer(_Layer):
    # of what the layer returns, where that is a tuple
    length = 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        states = self.under_way.states
        if states is not None:
            return (states, *[None] * (self.length - 1)) if self.length else states
        output = self.layer(hidden_states, *args, **kwargs)
        self.length = len(output) if isinstance(output, tuple) else 0
        return output


class _TrainedLayer(_Layer):
    checkpointed = False

    def __init__(self, layer: nn.Module, under_way: _Pass) -> None:
        super().__init__(layer, under_way)
        # what follows the states
        self.names = [*inspect.signature(layer.forward).parameters][1:]
        if "attention_mask" not in self.names:
            raise ValueError(
                f"layers of {type(layer).__name__} take no attention_mask, and cannot be made to "
                "attend in both directions; give another language model"
            )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.under_way.states is None or self.under_way.real is None:
            raise _StatesReached(hidden_states)
        # some models give the mask by its place
        kwargs.update(zip(self.names, args, strict=False))
        kwargs["attention_mask"] = _both_ways(
            kwargs.get("attention_mask"), self.under_way.real, hidden_states.dtype
        )
        if self.checkpointed and self.training:
            return checkpoint(self.layer, hidden_states, use_reentrant=False, **kwargs)
        return self.layer(hidden_states, **kwargs)


def _both_ways(mask: Tensor | None, real: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's mask made symmetric: a token also sees those that see it. Windows stay windows.

    Args:
        mask: the layer's own, (N or 1, 1, L or 1, L): bool, or added to the logits; None for all
            tokens or all earlier ones.
        real: (N, L) bool, False at padding.
        dtype: of the result, (N, 1, L, L), which is added to the logits.
    """
    seen = real[:, None, None, :].expand(-1, -1, real.shape[1], -1)
    if mask is not None:
        if mask.ndim != 4:
            raise ValueError(
                f"a layer's attention_mask has shape {tuple(mask.shape)}, not (N, 1, L, L); give "
                "a language model whose layers take masks of pairs of tokens"
            )
        allowed = mask if mask.dtype == torch.bool else mask == 0
        seen = seen & (allowed | allowed.mT)
    # padding sees at least itself: a row without any logit would be NaN, and 0 * NaN is too
    seen = seen | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class SplitModel(nn.Module):
    """A language model without head, frozen but for its last layers and what comes after them.

    The trained layers attend in both directions. That they do, and ignore padding, is
    tried out on two tokens; so is which of the other parameters act after the frozen layers alone
    (the final norm), to be trained as well.

    Args:
        model: of `transformers.AutoModel`, with attention "sdpa" or "eager"; its layers are
            wrapped in place.
        trained: how many layers, from the last.

    Attributes:
        width: of the model's last states.

    Raises:
        ValueError: the model has not so many layers, or is not built as is needed.
    """

    def __init__(self, model: nn.Module, trained: int) -> None:
        super().__init__()
        # what it has is its family's business
        self.model: Any = model
        config: Any = model.config
        kind = type(model).__name__
        if config.is_encoder_decoder or config.get_text_config() is not config:
            raise ValueError(f"{kind} is not one stack of text layers; give a language model")
        layers = _list_of_layers(model, getattr(config, "num_hidden_layers", 0))
        if not 1 <= trained <= len(layers):
            raise ValueError(
                f"{trained} unfrozen layers of {kind}, which has {len(layers)}; give 1 to "
                f"{len(layers)}"
            )
        # states are those of whole texts, none is continued
        config.use_cache = False
        self._pass = _Pass()
        frozen = len(layers) - trained
        for index, layer in enumerate(layers):
            wrap = _FrozenLayer if index < frozen else _TrainedLayer
            layers[index] = wrap(layer, self._pass)
        # of wrapped layers
        self._trained: list[Any] = [*layers][frozen:]
        self.eval()
        inside = {*layers.parameters()}
        others = self._try_out([p for p in model.parameters() if p not in inside])
        self.requires_grad_(False)
        for part in (*self._trained, *others):
            part.requires_grad_()
        self.train()

    def states(self, tokens: Tensor) -> Tensor:
        """What enters the first trained layer, (N, L, width), of tokens as in `forward`."""
        try:
            self._run(tokens)
        except _StatesReached as reached:
            return reached.args[0]
        raise AssertionError("no trained layer was called")

    def forward(self, tokens: Tensor, states: Tensor) -> Tensor:
        """The model's last states, (N, L, width).

        Args:
            tokens: (N, L) int64; below 0 at padding, which comes after a text.
            states: (N, L, width), of `states`; any finite values at padding.
        """
        self._pass.states, self._pass.real = states, tokens >= 0
        try:
            return self._run(tokens)
        finally:
            self._pass.states = self._pass.real = None

    def train(self, mode: bool = True) -> "SplitModel":
        """As of any module; the frozen part stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        for layer in self._trained:
            layer.train(mode)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trained layers' activations in the backward pass, layer by layer."""
        for layer in self._trained:
            layer.checkpointed = enable

    def plain_state(self) -> dict[str, Tensor]:
        """The model's state dictionary under the names that it had before it was cut."""
        layers = [n for n, module in self.model.named_modules() if isinstance(module, _Layer)]
        state: dict[str, Tensor] = self.model.state_dict()
        for layer in layers:
            wrapped = f"{layer}.layer."
            state = {
                name.replace(wrapped, f"{layer}.", 1) if name.startswith(wrapped) else name: value
                for name, value in state.items()
            }
        return state

    def _run(self, tokens: Tensor) -> Tensor:
        real = tokens >= 0
        # RoBERTa and its kin count positions of tokens that are not padding
        padding = max(0, getattr(self.model.config, "pad_token_id", None) or 0)
        return self.model(tokens.where(real, padding), attention_mask=real.long())[0]

    def _try_out(self, outside: list[nn.Parameter]) -> list[nn.Parameter]:
        """Check the trained layers; of the parameters outside, those that act after them alone."""
        self.requires_grad_()
        calls: list[tuple[Tensor, Any]] = []
        hooks = [
            wrapped.layer.register_forward_hook(lambda _, args, made: calls.append((args[0], made)))
            for wrapped in self._trained
        ]
        last = self.model.config.vocab_size - 1
        tokens = torch.tensor([[last, last, -1]], device=self.model.device)
        with torch.enable_grad():
            states = self.states(tokens)
            output = self(tokens, states.detach().requires_grad_())
        self.width = output.shape[-1]
        for hook in hooks:
            hook.remove()
        if not torch.equal(calls[0][0], states):
            raise ValueError(
                f"{type(self.model).__name__} computes between its layers; give another language "
                "model"
            )
        for given, made in calls:
            first = (made[0] if isinstance(made, tuple) else made)[0, 0, 0]
            (gradient,) = torch.autograd.grad(first, given, retain_graph=True)
            _, later, padding = gradient[0].abs().sum(-1).tolist()
            if later == 0 or padding > 0:
                raise ValueError(
                    f"a layer of {type(self.model).__name__} ignores its attention mask and "
                    "cannot be made to attend in both directions; give another language model"
                )
        before = torch.autograd.grad(states[0, 0, 0], outside, allow_unused=True)
        after = torch.autograd.grad(output[0, 0, 0], outside, allow_unused=True)
        uses = zip(outside, before, after, strict=True)
        return [p for p, early, late in uses if early is None and late is not None]


def _list_of_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The one outermost list of so many modules."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if count < 1 or len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outermost)} lists of {count} layers where one is "
            "looked for; give another language model"
        )
    return lists[outermost[0]]
