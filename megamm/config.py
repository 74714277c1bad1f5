"""Every setting of a training run, in one place.

Keyword-only dataclasses with a sentence for each field; ``settings.py`` fills them from YAML and from
``--section.key value`` overrides. Settings made in Python are checked by nobody.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megamm.settings import read_settings, setting

COUNT = 10**9
"""More rows, tokens of a vocabulary or ranks than anybody has."""
STEPS = 10**12
"""More steps than anybody trains."""


Fit = Literal["squash", "crop", "pad", "native"]
"""How an image becomes square, or keeps its shape (megamm.data.images.resize)."""


def default_head_dim(width: int) -> int:
    """The least multiple of 8 from 64 to 128 that divides the width, a multiple of 8; or else the largest below."""
    # Narrower heads have more scores, whose exponentials then bind attention, not its products.
    return next(d for d in (*range(64, 129, 8), *range(56, 0, -8)) if width % d == 0)


def default_decoder_head_dim(width: int) -> int:
    """As :func:`default_head_dim`, but 64 rather than less where heads of 64 all but fill the width."""
    head_dim = default_head_dim(width)
    return 64 if head_dim < 64 and heads_fill(width, 64) else head_dim


def heads_fill(width: int, head_dim: int) -> bool:
    """Whether the heads that fit into the width leave at most a 64th of it."""
    # A model then is less than 0.5% smaller than one without a rest.
    return width % head_dim <= width // 64


@dataclass(kw_only=True)
class VisionConfig:
    """The image encoder of a late-fusion model."""

    kind: Literal["megamm", "clip", "siglip"] = "megamm"
    """megamm: the decoder's block over patches; clip, siglip: the towers of these names, with learned positions, layer
    norms and biases, which can take their weights (start.vision_weights)."""
    width: int | None = setting(None, min=2, max=10**6)
    """Width of the vision tower; by default half of model.width, rounded up to a multiple of head_dim."""
    depth: int | None = setting(None, min=1, max=10**4)
    """Number of blocks; by default model.depth."""
    head_dim: int | None = setting(None, min=2, max=10**4)
    """Width of an attention head; by default model.head_dim where it divides the tower's width, otherwise the least
    multiple of 8 from 64 to 128 that does, or else the largest below."""
    hidden: int | None = setting(None, min=1, max=10**7)
    """Hidden width of the feed-forward layers; by default as in the decoder, or 4 times the width (clip, siglip)."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] | None = None
    """Of clip and siglip: x Phi(x), x sigmoid(1.702 x), or the tanh form; by default quick_gelu (clip) and gelu_tanh
    (siglip)."""
    norm_eps: float | None = setting(None, min=1e-30, max=1)
    """Added to the variance in the tower's norms; by default model.norm_eps, or 1e-5 (clip) and 1e-6 (siglip)."""
    final_norm: bool = True
    """Norm after the last block; LLaVA has none."""
    patch_size: int | None = setting(None, min=1, max=10**4)
    """Patch height and width of the tower, a divisor of model.patch_size (its default). Features of its patches in one
    of the model's are laid side by side for the projector: fewer positions in the decoder (pixel shuffle)."""
    projector: Literal["linear", "mlp"] = "linear"
    """From the tower's width to the decoder's: one matrix, or two with biases and a GELU between them (LLaVA 1.5)."""


@dataclass(kw_only=True)
class RopeScalingConfig:
    """How rotary wavelengths are stretched, for rows longer than those of a first training."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """linear: all wavelengths by the factor (arXiv 2306.15595); llama3: long ones by the factor, short ones not, and
    those in between by a part of it (Llama 3.1)."""
    factor: float = setting(1.0, min=1, max=1e6)
    """How many times longer."""
    low_frequency_factor: float = setting(1.0, min=1e-3, max=1e6)
    """llama3: wavelengths above original_length divided by this are stretched in full."""
    high_frequency_factor: float = setting(4.0, min=1e-3, max=1e6)
    """llama3: wavelengths below original_length divided by this stay as they are."""
    original_length: int = setting(8192, min=1, max=10**9)
    """llama3: longest row of the first training."""

    def problems(self) -> list[str]:
        if self.kind == "llama3" and self.high_frequency_factor <= self.low_frequency_factor:
            return [
                f"model.rope_scaling.high_frequency_factor: {self.high_frequency_factor:g} must be above "
                f"low_frequency_factor {self.low_frequency_factor:g}"
            ]
        return []


@dataclass(kw_only=True)
class AttentionConfig:
    """Who computes the decoder's attention; all backends give the same numbers."""

    backend: Literal["interval", "flex", "flex_flash", "flash", "sdpa"] | None = None
    """interval: our Triton kernel; flex: FlexAttention; flex_flash: its FLASH backend (flash-attn-4); flash:
    flash-attn, for rows of text only; sdpa: torch's own, also on the CPU. By default interval on CUDA, sdpa on the
    CPU."""


@dataclass(kw_only=True)
class ExpertsConfig:
    """Sparse mixture of experts in place of the decoder's feed-forward layers; dropless (docs/experts.md)."""

    num: int = setting(0, min=0, max=10**5)
    """Experts of a block, among which a learned router chooses (the paper: 8); 0 = dense."""
    top_k: int = setting(1, min=1, max=10**5)
    """Experts of each position."""
    hidden: int | None = setting(None, min=1, max=10**6)
    """SwiGLU hidden width of an expert (fine-grained experts: a part of the dense one); by default the dense one."""
    shared_hidden: int = setting(0, min=0, max=10**6)
    """SwiGLU hidden width of a further expert that every position meets; 0 = none."""
    normalise: bool = False
    """Scale the chosen experts' probabilities to a sum of 1; needs a top_k of 2 or more."""
    balance_weight: float = setting(0.01, min=0, max=1e6)
    """Weight of the loss that spreads each row's positions over the experts; it is 1 where they are spread evenly."""
    z_weight: float = setting(0.001, min=0, max=1e6)
    """Weight of the router z-loss, the mean square of the log-sum-exp of its logits."""
    bias_rate: float = setting(0.0, min=0, max=1)
    """Step by which each expert's bias, which counts in the choice alone, moves towards an even load after every
    optimizer step (DeepSeek-V3: 0.001, with a balance_weight of 0.0001 or 0); 0 = no bias."""

    def problems(self) -> list[str]:
        found = []
        if self.num and self.top_k > self.num:
            found.append(f"model.experts.top_k: {self.top_k} is above model.experts.num {self.num}")
        if self.num and self.normalise and self.top_k == 1:
            found.append(
                "model.experts.normalise: the one probability would always be 1, and the router would get no gradient; "
                "set it to false or model.experts.top_k to 2 or more"
            )
        return found


@dataclass(kw_only=True)
class ModelConfig:
    """Architecture and size."""

    architecture: Literal["early", "late", "text"] = "early"
    """early: raw patches in the decoder; late: a ViT before it; text: blind, images left empty (a baseline)."""
    width: int = setting(800, min=2, max=10**6, study=True)
    """Width of the residual stream."""
    depth: int = setting(24, min=1, max=10**4)
    """Number of blocks."""
    heads: int | None = setting(None, min=1, max=10**6)
    """Heads of queries; by default as many as fit into model.width. Their widths need not add up to it."""
    head_dim: int | None = setting(None, min=2, max=10**4)
    """Width of an attention head; by default model.width / model.heads where that is set, otherwise the least
    multiple of 8 from 64 to 128 that divides the width; without one, 64 where that leaves at most a 64th of the
    width, or else the largest multiple of 8 below that divides it."""
    key_heads: int | None = setting(None, min=1, max=10**6)
    """Heads of keys and values (grouped-query attention), a divisor of the query heads; by default as many."""
    hidden: int | None = setting(None, min=1, max=10**7)
    """SwiGLU hidden width; by default 8/3 of the width, rounded up to a multiple of model.hidden_multiple."""
    hidden_multiple: int = setting(256, min=1, max=10**6)
    """The SwiGLU hidden width is 8/3 of the width rounded up to a multiple of this, unless model.hidden is set."""
    qk_norm: bool = True
    """RMS norm of each head's queries and keys, with a scale of their own; Llama and Qwen2 have none."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2)."""
    tied_embeddings: bool = False
    """The head is the transpose of the table of the embedding: one matrix instead of two."""
    vocab_size: int | None = setting(None, min=1, max=COUNT)
    """Rows of both embedding tables; by default, and at least, the tokenizer's, from the prepared data."""
    image_size: int | None = setting(None, min=1, max=10**5)
    """Image height and width in pixels, of native images the square that has the most patches of one; by default the
    prepared data's."""
    patch_size: int | None = setting(None, min=1, max=10**4)
    """Patch height and width in pixels; by default the prepared data's."""
    rope_theta: float = setting(10000.0, min=1, max=1e12)
    """Base of the rotary position embedding."""
    norm_eps: float = setting(1e-6, min=1e-30, max=1)
    """Added to the mean square in every RMS norm."""
    image_mask: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether the patches of an image see all of it, or only those before them, as in LLaVA."""
    image_positions: Literal["sequence", "grid"] = "sequence"
    """Rotary positions of patches: one after the other, or half of each head by row and half by column."""
    per_modality: Literal["none", "feed_forward", "block"] = "none"
    """What text and image positions have a copy of their own of: nothing; the decoder's feed-forward layers (the
    modality-aware baseline of the paper); every weight of its blocks (mixture of transformers)."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def problems(self) -> list[str]:
        found = []
        # As resolve_model will set it; None where there is no such width.
        head_dim = self.head_dim or (default_decoder_head_dim(self.width) if self.width % 8 == 0 else None)
        if self.heads:
            head_dim = self.head_dim or (None if self.width % self.heads else self.width // self.heads)
            if head_dim is None or head_dim % 2:
                found.append(
                    f"model.heads: {self.heads} heads of model.width {self.width} have no even whole width; set an "
                    "even model.head_dim"
                )
            # One problem of heads at a time: the others follow from it.
            elif self.key_heads and self.heads % self.key_heads:
                found.append(f"model.key_heads: {self.key_heads} does not divide model.heads {self.heads}")
        elif head_dim is None:
            found.append(f"model.width: {self.width} is not a multiple of 8; change it or set model.head_dim")
        elif head_dim % 2 or not heads_fill(self.width, head_dim):
            found.append(
                f"model.head_dim: {head_dim} must be even and divide model.width {self.width} up to a rest of at most "
                "1/64 (or set model.heads)"
            )
        elif self.key_heads and self.width // head_dim % self.key_heads:
            found.append(
                f"model.key_heads: {self.key_heads} does not divide the {self.width // head_dim} query heads "
                f"(model.width {self.width} / model.head_dim {head_dim})"
            )
        # Here and not in VisionConfig: whether the tower's sizes fit depends on those of the decoder.
        vision = self.vision
        if vision.head_dim and (vision.head_dim % 2 or (vision.width or 0) % vision.head_dim):
            of = "" if vision.width is None else f" and divide model.vision.width {vision.width}"
            found.append(f"model.vision.head_dim: {vision.head_dim} must be even{of}")
        elif vision.width and not vision.head_dim and vision.width % 8 and (not head_dim or vision.width % head_dim):
            found.append(
                f"model.vision.width: {vision.width} is not a multiple of 8; change it or set model.vision.head_dim"
            )
        # Only where both are set: the data may still decide.
        if vision.patch_size and self.patch_size and self.patch_size % vision.patch_size:
            found.append(
                f"model.vision.patch_size: {vision.patch_size} does not divide model.patch_size {self.patch_size}"
            )
        if self.image_size and self.patch_size and self.image_size % self.patch_size:
            found.append(f"model.patch_size: {self.patch_size} does not divide model.image_size {self.image_size}")
        if self.experts.num and self.per_modality != "none":
            found.append(
                f"model.per_modality: {self.per_modality}, but model.experts.num is {self.experts.num}; a block has "
                "learned experts or weights per modality, not both"
            )
        return found


@dataclass(kw_only=True)
class SourceConfig:
    """One data source of the mixture."""

    path: str
    """Folder written by tools/prepare_data.py."""
    weight: float = setting(1.0, min=1e-9, max=1e9)
    """Share of the mixture's tokens (text tokens and patches), relative to the other sources."""


@dataclass(kw_only=True)
class AugmentConfig:
    """Image augmentation, drawn anew for each epoch from the data seed."""

    crop_scale_min: float = setting(1.0, min=0.001, max=1)
    """Random resized crop keeps between this share of the area and all of it (the paper: 0.4); 1 = off."""
    flip: bool = False
    """Random horizontal flip. Wrong for captions that say left and right, and for text in images."""


@dataclass(kw_only=True)
class DataConfig:
    """Mixture, packing and loading."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name -> prepared dataset and weight; the names head the per-source losses."""
    row_length: int = setting(1024, min=8, max=2**31 - 1)
    """Positions in a packed row (they are counted in int32)."""
    window_tokens: int = setting(1_000_000, min=8, max=10**15)
    """Documents of about this many tokens are drawn, shuffled and packed together."""
    seed: int = setting(0, min=0, max=2**63 - 1)
    """Seed of the data order."""
    workers: int = setting(1, min=0, max=1024, free=True)
    """Loader processes per rank; 0 loads in the training process. The data order does not depend on it."""
    prefetch: int = setting(4, min=1, max=1024, free=True)
    """Batches each worker keeps ready."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def problems(self) -> list[str]:
        if self.window_tokens < self.row_length:
            return [f"data.window_tokens: {self.window_tokens} is less than a row (data.row_length {self.row_length})"]
        return []


@dataclass(kw_only=True)
class StartConfig:
    """First values from other weights, in place of random ones (docs/exchange.md)."""

    weights: str | None = None
    """Run directory, checkpoint, Hugging Face folder or folder of tools/convert_checkpoint.py to start from. The vision
    tower, projector or patch projection may be missing there: they begin as in a new model."""
    vision_weights: str | None = None
    """Hugging Face folder of a CLIP or SigLIP, for the vision tower (model.vision.kind)."""
    first_row: int = setting(0, min=0, max=COUNT)
    """Row of our vocabulary that is the first one of start.weights; rows before it and after theirs begin as in a new
    model."""

    def problems(self) -> list[str]:
        if self.first_row and not self.weights:
            return [f"start.first_row: {self.first_row} without start.weights; set both"]
        return []


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon with AdamW for what is no matrix of a block; weight decay is decoupled."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the blocks take orthogonalised steps, of the same size as AdamW's at the same lr."""
    momentum: float = setting(0.95, min=0, below=1)
    """Share of the momentum that a step of Muon keeps."""
    lr: float = setting(1.5e-3, min=1e-12, max=1e38)
    """Peak learning rate."""
    vision_lr_factor: float = setting(0.01, also=0, min=1e-9, max=1e6)
    """The vision tower's learning rate is this times lr (late fusion); 0 = the tower stays as it was drawn."""
    beta1: float = setting(0.9, min=0, below=1)
    """Share of the mean gradient that a step keeps."""
    beta2: float = setting(0.95, min=0, below=1)
    """Share of the mean squared gradient that a step keeps."""
    eps: float = setting(1e-8, min=1e-30, max=1)
    """Added to the root of the mean squared gradient, by which a step is divided."""
    weight_decay: float = setting(1e-4, min=0, max=1)
    """Share of a weight removed per step at the peak rate, not multiplied by lr; on matrices only."""
    offload: bool = setting(False, free=True)
    """Keep AdamW's moments in the host's memory and step there: 8 bytes per parameter less on the device."""
    clip: float = setting(1.0, also=0, min=1e-9, max=1e9)
    """Largest norm of the whole gradient; 0 = no clipping."""
    freeze: list[str] = field(default_factory=list)
    """Beginnings of names of parameters that stay as they began, such as blocks. or vision."""
    freeze_until: int | None = setting(None, min=1, max=STEPS)
    """Step from which optimizer.freeze no longer holds; by default it holds to the end."""

    def problems(self) -> list[str]:
        found = []
        if self.freeze_until is not None and not self.freeze:
            found.append(f"optimizer.freeze_until: {self.freeze_until} without optimizer.freeze; set both")
        if self.offload and self.name != "adamw":
            found.append(f"optimizer.offload: only with optimizer.name adamw, not {self.name}")
        return found


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over steps: warm-up, constant, cool-down."""

    warmup_steps: int = setting(1000, min=0, max=STEPS)
    """Steps of linear warm-up. A run of fewer never reaches optimizer.lr; training and the dry run say so."""
    cooldown: Literal["inverse_sqrt", "one_minus_sqrt", "linear", "cosine", "none"] = "inverse_sqrt"
    """Shape of the cool-down; none keeps the rate constant (the trunk of a ladder)."""
    cooldown_fraction: float = setting(0.2, min=0, max=1)
    """Share of all steps spent in the cool-down."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch, numerics and place of a run."""

    run_dir: str = setting("runs/default", free=True, study=True)
    """Where config.yaml, run.json, metrics.jsonl, tensorboard/, checkpoints/ and result.json go."""
    steps: int | None = setting(None, min=1, max=STEPS, study=True)
    """Optimizer steps; give this or tokens."""
    tokens: float | None = setting(None, min=1, max=1e18, study=True)
    """Positions to train on (text tokens, patches and padding); at least a batch, and rounded up to whole
    steps."""
    batch_rows: int = setting(2048, min=1, max=COUNT)
    """Rows of a global batch; with rows of 1024 the default is 2M tokens."""
    micro_rows: int | None = setting(None, min=1, max=COUNT, free=True)
    """Rows of one forward and backward pass of a rank; by default the rank's whole share of the batch."""
    seed: int = setting(0, min=0, max=2**63 - 1)
    """Seed of the initial weights."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", free=True)
    """auto: cuda where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters and optimizer state stay float32."""
    fp8: bool = False
    """Matrix products of the blocks in 8-bit floats with a scale per tensor, by torchao; emulated on a CPU."""
    compile: bool = setting(False, free=True)
    """Compile the blocks with torch.compile."""
    recompute: Literal["none", "per_op", "full"] = setting("none", free=True)
    """Activations computed again in the backward instead of kept: of no block; of its cheap operations (norms,
    activation functions), keeping what matrix products and attention give; of the whole block. Exact."""
    log_every: int = setting(10, min=1, max=STEPS, free=True)
    """Steps between lines of metrics.jsonl."""
    timeout_minutes: float = setting(10.0, min=0.01, max=1e5, free=True)
    """Minutes that a rank waits for the others in a step before the run ends with an error."""
    profile_steps: list[int] = setting(default_factory=list, min=1, max=STEPS, free=True)
    """[first, last] step to profile, or [one], counted from 1; the profile goes to the folder profile/ of the run."""
    deterministic: bool = setting(False, free=True)
    """Refuse operations whose result may differ from run to run on the same device; slower on GPUs."""
    wandb: str | None = setting(None, free=True)
    """Project of Weights & Biases to log to, beside TensorBoard."""
    peak_flops: float | None = setting(None, min=1, max=1e21, free=True)
    """FLOP/s of one rank's device, against which MFU is stated; without it MFU is not logged."""
    variant: str | None = setting(None, study=True)
    """What run tables and reports call the architecture; by default model.architecture, with -moe where it has
    experts."""
    sweep: str | None = setting(None, study=True)
    """What a study varied in this run, such as `lr 2`; such a run is in no law of losses."""
    branch_from: str | None = setting(None, study=True)
    """Run directory of a trunk; start from its checkpoint of the step where the cool-down begins."""

    def problems(self) -> list[str]:
        found = []
        if (self.steps is None) == (self.tokens is None):  # both, or neither
            found.append("train.steps, train.tokens: give exactly one of the two")
        window = self.profile_steps
        if len(window) > 2 or window != sorted(window):  # empty: no profile
            found.append(f"train.profile_steps: {window} is not [first, last]; for example [10, 12]")
        return found


@dataclass(kw_only=True)
class TaskConfig:
    """A file of prompts whose answers are scored, at each validation (docs/generate.md)."""

    path: str
    """JSONL with a prompt, its images and the right answer in each line."""
    kind: Literal["choice", "vqa", "caption"]
    """choice: share of prompts whose right choice is the most probable; vqa: exact match of the answer; caption:
    CIDEr-D."""
    max_new_tokens: int = setting(128, min=1, max=10**6)
    """Longest answer (vqa, caption)."""
    stop: str | None = None
    """Text before which an answer ends (vqa, caption)."""
    fit: Fit | None = None
    """How images become square, or native; by default as in the training data."""
    batch_size: int = setting(8, min=1, max=10**6)
    """Prompts that a rank answers at a time."""


@dataclass(kw_only=True)
class EvalConfig:
    """Validation on the val split of every source, the same rows each time, and tasks."""

    every: int = setting(0, min=0, max=STEPS, free=True)
    """Steps between validations; 0 = at the end only."""
    rows: int = setting(64, min=1, max=10**6)
    """Rows per source."""
    swap_images: bool = False
    """Also evaluate with each image replaced by another one, to show how far images are used."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Name -> prompts and the kind of answers; the names head the scores."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming. A run directory with a checkpoint is resumed from it."""

    every: int = setting(1000, min=0, max=STEPS, free=True)
    """Steps between checkpoints; 0 = at the end and at `steps` only."""
    steps: list[int] = setting(default_factory=list, min=1, max=STEPS, free=True, study=True)
    """Further steps to save at; these are never deleted (the branch points of a trunk)."""
    keep: int = setting(2, min=1, max=COUNT, free=True)
    """Number of the newest periodic checkpoints kept."""
    final: bool = setting(True, free=True)
    """Save at the last step."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    dp_replicate: int = setting(1, min=1, max=COUNT, free=True)
    """Data-parallel replicas; within each the parameters are sharded (HSDP)."""
    dp_shard: int = setting(-1, also=-1, min=1, max=COUNT, free=True)
    """Ranks that each hold a shard of every parameter (FSDP2) and read their own rows; -1: all that the other axes
    leave."""
    tensor: int = setting(1, min=1, max=COUNT, free=True)
    """Ranks that share each matrix product; between the blocks the positions are spread over them."""
    pipeline: int = setting(1, min=1, max=COUNT, free=True)
    """Stages of blocks, each on ranks of its own."""
    context: int = setting(1, min=1, max=COUNT, free=True)
    """Ranks that share the positions of a row."""
    expert: int = setting(1, min=1, max=COUNT, free=True)
    """Ranks that share the experts of a layer; they are taken from the data-parallel ones."""
    pipeline_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = setting("1f1b", free=True)
    """Order of the micro-batches' passes through the stages."""
    micro_batches: int | None = setting(None, min=1, max=COUNT, free=True)
    """Micro-batches of a step in a pipeline; by default twice the stages."""
    context_method: Literal["gather", "ring"] = setting("gather", free=True)
    """How attention sees the keys of the whole row: gathered at once, or passed around the ranks."""
    reshard_after_forward: bool = setting(True, free=True)
    """Drop a block's gathered parameters after its forward and gather them again for its backward."""
    reduce_every_pass: bool = setting(True, free=True)
    """Reduce gradients after each of several passes: less memory, more communication; else once a step."""

    @property
    def reshards(self) -> bool:
        """Whether units drop their gathered parameters after the forward.

        The zero-bubble schedule looks a stage's weights up between forward and backward, and must find the gathered
        ones.
        """
        return self.reshard_after_forward and self.pipeline_schedule != "zero_bubble"


@dataclass(kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    start: StartConfig = field(default_factory=StartConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def variant(self) -> str:
        """What run tables call the architecture."""
        return self.train.variant or self.model.architecture + ("-moe" if self.model.experts.num else "")

    def problems(self) -> list[str]:
        tokens, batch = self.train.tokens, self.train.batch_rows * self.data.row_length
        # It would be rounded up to a step, longer than what was asked for.
        if tokens is not None and tokens < batch:
            return [
                f"train.tokens: {tokens:g} is less than one batch, {batch:,} positions (train.batch_rows "
                f"{self.train.batch_rows} x data.row_length {self.data.row_length}); make the batch smaller, or set "
                "train.steps"
            ]
        return []


def load(paths: list[Path | str] | Path | str | None, overrides: list[str] | None = None) -> Config:
    """Read a training config from YAML and command-line overrides.

    Raises:
        InputError: a file that cannot be read, or every problem of the settings at once.
    """
    return read_settings(Config, paths, overrides)
