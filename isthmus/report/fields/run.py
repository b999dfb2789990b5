"""What a run was, and came to beside its scores and costs: what trained, with what software, on how many tokens.

Knows counts, names, settings and versions; looks none of them up.
"""

from isthmus.report.fields.block import Amount, Block, Count, Digest, Share


class Settings(Block):
    """What decides a run beside its method, model, cut, rank, seed and steps.

    `targets` is null where the family's usual modules were tuned, `alpha` and `dropout` where the method has none.
    `data` is the SHA-256 of the file of training rows, `peft_options` what else the method was told, as NAME=VALUE.
    """

    learning_rate: Amount
    schedule: str
    warmup_steps: Count
    clip_norm: Amount
    batch_size: Count
    max_length: Count
    targets: tuple[str, ...] | None
    alpha: Amount | None
    dropout: Share | None
    data: Digest
    peft_options: tuple[str, ...] = ()


class Tokens(Block):
    """Tokens trained on, without padding, and positions computed for them, with it."""

    real: Count
    padded: Count


class Params(Block):
    """Parameter counts; `changed`: of the full model, after merging; `stored_bytes`: the adapter's files."""

    trainable: Count | None
    head: Count | None
    changed: Count | None
    rank: Count | None
    stored_bytes: Count | None


class Throughput(Block):
    """Real tokens a second."""

    train_tokens_per_s: Amount | None
    eval_tokens_per_s: Amount | None


class Versions(Block):
    """Versions of what ran on the edge."""

    isthmus: str
    torch: str
    transformers: str
    peft: str | None
    python: str


class Codecs(Block):
    """What tensors were encoded with on the wire, by role; null where nothing of the role crosses."""

    activation: str
    gradient: str | None
    port: str | None = None


class SideNetwork(Block):
    """A network beside the backbone: `reduction` times narrower, fed by `taps` taps of `tap_width` values a token.

    There is a tap every `tap_every` blocks of the span.
    """

    reduction: Count
    tap_every: Count
    tap_width: Count
    taps: Count


class BegunFrom(Block):
    """The earlier run whose adapter a run began with: its method, and the SHA-256 of the adapter's tensors."""

    method: str
    adapter: Digest


class Sample(Block):
    """A text that the tuned model wrote."""

    prompt: str
    text: str
