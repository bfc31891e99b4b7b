"""How the pocket learns to see: the vision tower first on a task of its own, then the whole model on captions.

Trained jointly from random weights, boxes come after a quarter of an hour and classes do not come at all. Three things
make it quick: a warm-up that asks every merged token what stands in its cell, in the digits that the answer will use;
residual outputs that begin at zero, so that image features reach every layer of the deep, narrow LLM unharmed; and
orthogonalized updates for the matrices.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl

from trainer.muon import Muon
from trainer.pocket_cells import CELL, CellHeads

# Shapes: B scenes, C cells (merged tokens) of a scene, L tokens, D width.

PATCH, MERGE, TEMPORAL = 16, 2, 2
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of training: steps, batch size, and the highest learning rates of its two kinds of updates."""

    steps: int
    batch: int
    muon: float
    """Of matrices in vision blocks and LLM layers."""
    adam: float
    """Of everything else: embeddings, norms, biases, mergers, the heads of the warm-up."""


@dataclass(frozen=True, slots=True)
class Scenes:
    """A data set in memory: pixels (B, side, side, 3) uint8, what its cells hold, answers as token ids."""

    pixels: Tensor
    cells: Tensor
    answers: tuple[Tensor, ...]
    n_objects: Tensor


def patches(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B * patches, 1536) float32, equal to what Qwen2VLImageProcessorPil makes of them."""
    b, h, w, _ = pixels.shape
    x = pixels.float().div(127.5).sub(1).permute(0, 3, 1, 2)
    x = x.reshape(b, 3, h // CELL, MERGE, PATCH, w // CELL, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    repeated = x.unsqueeze(6).expand(*x.shape[:6], TEMPORAL, PATCH, PATCH)
    return repeated.reshape(b * (h // PATCH) * (w // PATCH), -1)


def grids(pixels: Tensor) -> Tensor:
    """(B, 3): patches in time, height and width of each scene."""
    return torch.tensor([[1, pixels.shape[1] // PATCH, pixels.shape[2] // PATCH]]).expand(len(pixels), -1)


def see(model: Qwen3VLForConditionalGeneration, pixels: Tensor) -> list[Tensor]:
    """Outputs of the merger and the DeepStack mergers, each (B * C, D)."""
    out = model.model.visual(patches(pixels), grids(pixels), return_dict=True)
    return [out.pooler_output, *out.deepstack_features]


def warm_up(
    model: Qwen3VLForConditionalGeneration, heads: CellHeads, scenes: Scenes, phase: Phase, seed: int, say: Say
) -> None:
    """Train the vision tower, mergers included, to tell what stands in every cell."""
    tower = model.model.visual
    optimizers = _optimizers([(tower, phase.muon, phase.adam), (heads, 0.0, phase.adam)])
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for step in range(1, phase.steps + 1):
        chosen = torch.randint(len(scenes.pixels), (phase.batch,), generator=generator)
        loss = heads(see(model, scenes.pixels[chosen]), scenes.cells[chosen])
        loss.backward()
        _update(optimizers, [(tower, heads)], step, phase.steps, max_norm=5.0)
        if step % 100 == 0 or step == phase.steps:
            say(f"warm-up {step}/{phase.steps}  cell loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s")
    _rescale(model, scenes.pixels[:32])


@torch.no_grad()
def _rescale(model: Qwen3VLForConditionalGeneration, pixels: Tensor) -> None:
    """Bring image features to the size of word embeddings; the heads normalize, so they do not notice."""
    tower = model.model.visual
    mergers = [tower.merger, *tower.deepstack_merger_list]
    for merger, features, size in zip(mergers, see(model, pixels), (0.5, 0.15, 0.15, 0.15), strict=True):
        scale = size / features.square().mean().sqrt()
        merger.linear_fc2.weight.mul_(scale)
        merger.linear_fc2.bias.mul_(scale)


def caption_losses(
    model: Qwen3VLForConditionalGeneration,
    features: Sequence[Tensor],
    prompt: Tensor,
    positions: Tensor,
    answers: Sequence[Tensor],
) -> Tensor:
    """Nats of every answer token of a batch.

    All samples begin with the same tokens up to the image, half of their length: these are run once and their keys and
    values shared, which changes neither loss nor gradient.

    Args:
        model: the pocket.
        features: of `see`, for B scenes.
        prompt: (P,) token ids with the image's placeholders.
        positions: (3, L) of the prompt and of as many answer tokens as the longest answer has.
        answers: B rows of token ids.
    """
    llm, n = model.model.language_model, len(answers)
    image = prompt == model.config.image_token_id
    shared = int(image.nonzero()[0])
    ids = nn.utils.rnn.pad_sequence(
        [torch.cat([prompt[shared:], answer]) for answer in answers], batch_first=True, padding_value=-1
    )
    supervised = (ids >= 0) & (torch.arange(ids.shape[1]) >= len(prompt) - shared)
    ids = ids.clamp(min=0)
    cache = DynamicCache(config=llm.config)
    llm(input_ids=prompt[None, :shared], position_ids=positions[:, None, :shared], past_key_values=cache)
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        layer.keys, layer.values = layer.keys.expand(n, -1, -1, -1), layer.values.expand(n, -1, -1, -1)
    places = ids == model.config.image_token_id
    hidden = llm(
        inputs_embeds=llm.embed_tokens(ids).masked_scatter(places[..., None], features[0]),
        position_ids=positions[:, None, shared : shared + ids.shape[1]].expand(-1, n, -1),
        past_key_values=cache,
        visual_pos_masks=places,
        deepstack_visual_embeds=list(features[1:]),
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][supervised[:, 1:]])
    return F.cross_entropy(logits, ids[:, 1:][supervised[:, 1:]], reduction="none")


def learn_captions(
    model: Qwen3VLForConditionalGeneration,
    heads: CellHeads,
    scenes: Scenes,
    prompt: Tensor,
    positions: Tensor,
    phase: Phase,
    *,
    easy: tuple[int, int],
    seed: int,
    say: Say,
    checkpoint: Callable[[int], None],
) -> None:
    """Train everything on captions, with half of the cells' loss kept; the tower at lower rates.

    Args:
        model: the pocket, its tower warmed up.
        heads: of the warm-up.
        scenes: the training set.
        prompt: see `caption_losses`.
        positions: likewise.
        phase: its rates are the LLM's; the tower gets two thirds of the first and a quarter of the second.
        easy: (steps, batch) at the start with scenes of one digit only.
        seed: of the batches.
        say: gets a line of progress now and then.
        checkpoint: called every 200 steps with the number of steps done.
    """
    llm, tower = model.model.language_model, model.model.visual
    tower_rates = (phase.muon * 2 / 3, phase.adam / 4)
    optimizers = _optimizers([(llm, phase.muon, phase.adam), (tower, *tower_rates), (heads, 0.0, tower_rates[1])])
    batches = _caption_batches(scenes, phase, easy, torch.Generator().manual_seed(seed))
    started = time.perf_counter()
    for step, chosen in enumerate(batches, 1):
        features = see(model, scenes.pixels[chosen])
        nll = caption_losses(model, features, prompt, positions, [scenes.answers[i] for i in chosen.tolist()])
        (nll.mean() + 0.5 * heads(features, scenes.cells[chosen])).backward()
        _update(optimizers, [(llm,), (tower, heads)], step, phase.steps, max_norm=2.0)
        if step % 20 == 0 or step == phase.steps:
            seconds = time.perf_counter() - started
            say(f"captions {step}/{phase.steps}  loss {nll.mean().item():.3f}  {seconds:.0f} s")
        if step % 200 == 0:
            checkpoint(step)


def _caption_batches(
    scenes: Scenes, phase: Phase, easy: tuple[int, int], generator: torch.Generator
) -> Iterator[Tensor]:
    """One-digit scenes first; then eight batches at a time, sorted by length so that little is padding."""
    simple = (scenes.n_objects == 1).nonzero()[:, 0]
    lengths = torch.tensor([len(answer) for answer in scenes.answers])
    for _ in range(easy[0]):
        yield simple[torch.randint(len(simple), (easy[1],), generator=generator)]
    waiting: list[Tensor] = []
    for _ in range(phase.steps - easy[0]):
        if not waiting:
            drawn = torch.randint(len(lengths), (8 * phase.batch,), generator=generator)
            rows = drawn[torch.argsort(lengths[drawn], stable=True)].reshape(8, phase.batch)
            waiting = [rows[i] for i in torch.randperm(8, generator=generator).tolist()]
        yield waiting.pop()


def _optimizers(groups: Sequence[tuple[nn.Module, float, float]]) -> list[torch.optim.Optimizer]:
    """Muon and AdamW for (module, rate of one, rate of the other); every group remembers its peak."""
    muon: list[dict[str, Any]] = []
    adam: list[dict[str, Any]] = []
    for module, muon_rate, adam_rate in groups:
        named = dict(module.named_parameters())
        matrices = [
            name
            for name, p in named.items()
            if muon_rate and p.ndim == 2 and "embed" not in name and "merger" not in name
        ]
        if matrices:
            muon.append({"params": [named[name] for name in matrices], "peak": muon_rate})
        # Every step of AdamW moves the patch embedding along all 1536 inputs at once: at the full rate its output grows
        # until it drowns the position embedding.
        patch = [name for name in named if name.startswith("patch_embed.")]
        rest = [name for name in named if name not in matrices and name not in patch]
        adam.append({"params": [named[name] for name in rest], "peak": adam_rate})
        if patch:
            adam.append({"params": [named[name] for name in patch], "peak": adam_rate / 10})
    decay = 0.01
    return [
        Muon(muon, lr=0.0, momentum=0.95, weight_decay=decay),  # type: ignore[arg-type]  # groups, as torch allows
        torch.optim.AdamW(adam, lr=0.0, betas=(0.9, 0.98), weight_decay=decay),
    ]


def _update(
    optimizers: Sequence[torch.optim.Optimizer],
    clipped: Sequence[Sequence[nn.Module]],
    step: int,
    total: int,
    *,
    max_norm: float,
) -> None:
    """Clip the gradients of each group of modules, set the rates, update.

    Rates rise for 30 steps, stay, and fall over the last 60 % to a fiftieth.
    """
    for modules in clipped:
        nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], max_norm)
    share = min(1.0, step / 30) * max(0.02, min(1.0, (1 - (step - 1) / total) / 0.6))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextmanager
def batched_attention() -> Iterator[None]:
    """Let the vision tower attend to scenes of one size all at once, not in the library's loop over the images."""
    attention: Any = modeling_qwen3_vl.Qwen3VLVisionAttention
    original = attention.forward
    attention.forward = _attend_together
    try:
        yield
    finally:
        attention.forward = original


def _attend_together(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **_: Any
) -> Tensor:
    n = len(cu_seqlens) - 1
    length = hidden_states.shape[0] // n
    query, key, value = self.qkv(hidden_states).reshape(n * length, 3, self.num_heads, -1).unbind(1)
    query, key = modeling_qwen3_vl.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (x.reshape(n, length, self.num_heads, -1).transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scaling).transpose(1, 2)
    out: Tensor = self.proj(mixed.reshape(n * length, -1))
    return out
