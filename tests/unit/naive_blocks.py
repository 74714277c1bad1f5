"""Blocks of every kind, one position and one head at a time: what the model must compute, in its parameters' dtype."""

import torch
from torch import nn

from megamm.config import ExpertsConfig
from megamm.sequence import IMAGE, Batch


def rms(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * scale


def rotate(x: torch.Tensor, position: tuple[int, int], theta: float) -> torch.Tensor:
    """``position``: row and column, which turn the pairs of entries in turn; for text both are the same."""
    half = x.shape[0] // 2
    places = torch.tensor([position[i % 2] for i in range(half)], dtype=x.dtype)
    angles = places * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def feed_forward(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Rows of ``gate_up`` are gate, up, gate, up, ..."""
    return down @ (silu(gate_up[0::2] @ x) * (gate_up[1::2] @ x))


class Naive:
    """The loss and the auxiliary loss of a model, from its parameters and its input stream."""

    def __init__(self, model: nn.Module):
        self.config, self.p = model.config, dict(model.named_parameters())
        self.biases = dict(model.named_buffers())
        self.embedding, self.vision = model.embedding, model.vision

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        features = None if self.vision is None else self.vision(batch.patches, batch.grids, torch.float64)
        x = self.embedding(batch, features, torch.float64)
        rows, auxiliary = [list(row.unbind(0)) for row in x], 0.0
        for i in range(self.config.depth):
            for r, row in enumerate(rows):
                valid = [s for s in range(len(row)) if batch.lo[r, s] <= batch.hi[r, s]]
                rows[r], extra = self.block(f"blocks.{i}.", row, valid, batch, r)
                auxiliary = auxiliary + extra
        loss = 0.0
        for r, row in enumerate(rows):
            for s, target in enumerate(batch.targets[r].tolist()):
                if target >= 0:
                    logits = self.p["head.weight"] @ rms(row[s], self.p["head.norm.weight"], self.config.norm_eps)
                    loss = loss + torch.log(torch.exp(logits).sum()) - logits[target]
        return loss, torch.as_tensor(auxiliary)

    def block(self, name: str, row: list, valid: list[int], batch: Batch, r: int):
        """One row through one block; padding is left as it is, since nobody looks at it."""
        eps, dim = self.config.norm_eps, self.config.head_dim
        names = {s: name + self.part(int(batch.tokens[r, s])) for s in valid}
        heads = {}
        for s in valid:
            normed = rms(row[s], self.p[names[s] + "attention_norm.weight"], eps)
            group = self.p[names[s] + "attention.qkv.weight"] @ normed
            group = group.view(self.config.key_heads, -1, dim)
            scale = self.p[names[s] + "attention.qk_norm"]
            position = self.position(batch, r, s)
            queries = [rotate(rms(q, scale[0], eps), position, self.config.rope_theta) for g in group for q in g[:-2]]
            keys = [rotate(rms(g[-2], scale[1], eps), position, self.config.rope_theta) for g in group]
            heads[s] = queries, keys, [g[-1] for g in group]
        shared, out = len(heads[valid[0]][0]) // self.config.key_heads if valid else 1, list(row)
        for s in valid:
            attended = []
            for h, q in enumerate(heads[s][0]):
                end = s if self.config.image_mask == "causal" else int(batch.hi[r, s])
                seen = range(int(batch.lo[r, s]), end + 1)
                weights = torch.exp(torch.stack([q @ heads[t][1][h // shared] for t in seen]) / dim**0.5)
                weights = weights / weights.sum()
                attended.append(sum(w * heads[t][2][h // shared] for w, t in zip(weights, seen, strict=True)))
            out[s] = row[s] + self.p[names[s] + "attention.out.weight"] @ torch.cat(attended)
        normed = {s: rms(out[s], self.p[names[s] + "feed_forward_norm.weight"], eps) for s in valid}
        extra = 0.0
        if self.config.experts.num and valid:
            added, extra = self.experts(name + "feed_forward.", normed)
        else:
            added = {s: self.dense(names[s], int(batch.tokens[r, s]), x) for s, x in normed.items()}
        return [out[s] + added[s] if s in added else out[s] for s in range(len(out))], extra

    def position(self, batch: Batch, r: int, s: int) -> tuple[int, int]:
        """Row and column of a position, found by walking back to the image's first patch."""
        place, patch = int(batch.positions[r, s]), 0
        if self.on_grid(batch, r, s):
            while s - patch > 0 and batch.tokens[r, s - patch - 1] == IMAGE:
                patch += 1
        if not self.on_grid(batch, r, s):
            return place, place
        # Images are counted by their first patches, up to this one's.
        flat = (batch.tokens.flatten() == IMAGE).tolist()
        end = r * batch.tokens.shape[1] + s + 1
        number = sum(flat[i] and not (i and flat[i - 1]) for i in range(end)) - 1
        columns = int(batch.grids[number, 1])
        return place - patch + patch // columns, place - patch + patch % columns

    def on_grid(self, batch: Batch, r: int, s: int) -> bool:
        return self.config.image_positions == "grid" and bool(batch.tokens[r, s] == IMAGE)

    def part(self, token: int) -> str:
        if self.config.per_modality != "block":
            return ""
        return "image." if token == IMAGE else "text."

    def dense(self, name: str, token: int, x: torch.Tensor) -> torch.Tensor:
        name += "feed_forward."
        if self.config.per_modality == "feed_forward":
            name += "image." if token == IMAGE else "text."
        return feed_forward(x, self.p[name + "gate_up.weight"], self.p[name + "down.weight"])

    def experts(self, name: str, rows: dict[int, torch.Tensor]):
        settings: ExpertsConfig = self.config.experts
        out, chosen, probabilities, z = {}, [0] * settings.num, 0.0, 0.0
        for s, x in rows.items():
            logits = self.p[name + "router.weight"] @ x
            p = torch.exp(logits) / torch.exp(logits).sum()
            bias = self.biases.get(name + "bias")
            scores = [p[e].item() + (bias[e].item() if bias is not None else 0.0) for e in range(settings.num)]
            best = sorted(range(settings.num), key=lambda e, scores=scores: -scores[e])[: settings.top_k]
            total = sum(p[e] for e in best) if settings.normalise else 1.0
            gate_up, down = self.p[name + "experts.gate_up"], self.p[name + "experts.down"]
            out[s] = sum(p[e] / total * feed_forward(x, gate_up[e], down[e]) for e in best)
            if settings.shared_hidden:
                always = self.p[name + "shared.gate_up.weight"], self.p[name + "shared.down.weight"]
                out[s] = out[s] + feed_forward(x, *always)
            for e in best:
                chosen[e] += 1
            probabilities = probabilities + p
            z = z + torch.log(torch.exp(logits).sum()) ** 2
        f = torch.tensor(chosen, dtype=torch.float64) / (len(rows) * settings.top_k)
        balance = len(rows) * settings.num * (f * probabilities / len(rows)).sum()
        return out, settings.balance_weight * balance + settings.z_weight * z
