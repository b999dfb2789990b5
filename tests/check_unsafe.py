"""`make check`: nothing in the product may turn bytes into code.

Knows Python's syntax tree and a list of names. Ray pickles inside its own cluster, whose processes are the owner's
and take a token; nothing that an edge sent is handed to it but tensors and numbers.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("isthmus", "cloud_node", "edge_client", "emulator")
MODULES = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"})
"""Whoever imports one may run what a file or a peer says."""
CALLS = frozenset(
    {
        *(
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
            "torch.load",
            "torch.save",
            "torch.jit.load",
        ),
        *("torch.package.PackageImporter", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    }
)
FLAGS = {"allow_pickle": True, "trust_remote_code": True, "shell": True, "weights_only": False}
"""Arguments that open what is shut by default."""


def unsafe(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a file that may turn bytes into code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            named = (f"{module}.{name.name}" for name in node.names)
            yield from ((node.lineno, name) for name in named if module.split(".")[0] in MODULES or name in CALLS)
        elif isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in CALLS:
                yield node.lineno, name
            yield from (
                (node.lineno, f"{word.arg}={ast.unparse(word.value)}") for word in node.keywords if _opens(word)
            )


def _opens(word: ast.keyword) -> bool:
    """Whether an argument opens what is shut; one that is no constant may."""
    if word.arg not in FLAGS:
        return False
    return not isinstance(word.value, ast.Constant) or word.value.value is FLAGS[word.arg]


def main() -> int:
    """Name everything unsafe; the number of findings is the exit code."""
    found = [
        f"{path}:{line}: {name} may turn bytes into code"
        for folder in FOLDERS
        for path in sorted(Path(folder).rglob("*.py"))
        for line, name in unsafe(path.read_text(encoding="utf-8"))
    ]
    sys.stdout.write("\n".join(found or ["nothing turns bytes into code"]) + "\n")
    return len(found)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
