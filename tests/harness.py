"""What tests share: tiny models on disk, data files, and real server and client processes."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
READY_WITHIN_S = 180
LETTERS = pre_tokenizers.ByteLevel.alphabet()


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    """A configuration of 6 blocks and hidden size 32; dropout is 0, as parity needs."""
    vocabulary = len(LETTERS) + 3
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
        settings = {**ids, **sizes, "num_key_value_heads": 2, "max_position_embeddings": 256, **changes}
        return LlamaConfig(**settings)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**{**ids, **dropout, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256, **changes})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; no begin-of-sequence token is added."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + rank for rank, letter in enumerate(sorted(LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_tiny_model(directory: Path, family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of `family` and its tokenizer, saved; weights large enough that every block matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.05)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model.eval()


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Rows of differing lengths with two choices each."""
    generator = torch.Generator().manual_seed(seed)
    words = ["good", "bad", "slow", "fine", "odd", "a gem", "dull", "quick"]
    rows = []
    for _ in range(count):
        picks = torch.randint(
            0, len(words), (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator
        )
        text = " ".join(words[pick] for pick in picks.tolist())
        rows.append({"prompt": f"{text}:", "choices": [" no", " yes"], "answer": int(picks.sum()) % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Server:
    """A running `cloud_node serve`."""

    process: subprocess.Popen[str]
    address: str
    lines: list[str] = field(default_factory=list)

    def stop(self, signum: int = signal.SIGTERM, within_s: float = 30) -> int:
        """Send a signal and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(within_s)

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return "".join(self.lines)


def start_server(model: Path, *flags: str, cache: Path, port: int = 0, **environment: str) -> Server:
    """Start a server process on loopback and wait until it is ready; the caller stops it."""
    command = [sys.executable, "-m", "cloud_node", "serve", "--model", str(model), "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--listen", f"127.0.0.1:{port}", *flags],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return once_ready(process)


def once_ready(process: "subprocess.Popen[str]") -> Server:
    """A server of this process, whose output is read from now on; it is killed if it does not come up."""
    server = Server(process, "")
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.lines.append(line)
            if line.startswith("cloud_node: ready on "):
                server.address = line.split()[-1]
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    if not ready.wait(READY_WITHIN_S) or not server.address:
        process.kill()
        raise AssertionError(f"the server did not start:\n{server.log}")
    return server


@contextmanager
def serving(model: Path, *flags: str, cache: Path, port: int = 0, **environment: str) -> Iterator[Server]:
    """A server process while in here."""
    server = start_server(model, *flags, cache=cache, port=port, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)


def run_command(*arguments: str | Path, cache: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGUMENTS` to its end; output is captured, nothing is checked."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
