"""Whether the packages that everything needs are there, said in one line before the first of them is imported."""

import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["check_environment", "install_command"]

_NEEDED = ("torch", "numpy", "diffusers", "transformers", "pydantic", "rich")
"""The first is missing wherever nothing was installed; the others show an environment that was left half made."""

_ROOT = Path(__file__).resolve().parents[2]


def install_command(extra: str = "") -> str:
    """The command that installs this project here, with an extra of pyproject.toml if one is named."""
    extras = f"[{extra}]" if extra else ""
    if (_ROOT / "constraints.txt").is_file():
        return f'pip install --constraint constraints.txt --editable ".{extras}"'
    return f'pip install "unet-heirloom{extras}"'


def check_environment() -> None:
    """Raise ImportError where a package that everything needs is missing; a command ends with one line and exit code 2."""
    missing = [name for name in _NEEDED if name not in sys.modules and find_spec(name) is None]
    if not missing:
        return
    python = _ROOT / ".venv" / "bin" / "python"
    other = f"take {python}, or install what is missing" if python.exists() else "install what is missing"
    message = f"{sys.executable} has no {', '.join(missing)}; {other}: {install_command()}"
    if sys.argv[0] == "-m":  # the package of a command is being imported for `python -m`: its own code has not begun
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(message, name=missing[0])
