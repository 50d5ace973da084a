"""A mirror of the hub on this disk: the published two-step model, with a small Llama in the place of its base."""

import json
import shutil
from pathlib import Path

PUBLISHED = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp-supervised"
FIRST_STAGE = "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp"
BASE = "princeton-nlp/Sheared-LLaMA-1.3B"


def published_mirror(golden_dir: Path, root: Path) -> Path:
    """Make the mirror under `root`, and return the folder of the published adapter.

    As published: both adapters name the base, and only the second stage's own name tells that it was trained on the
    first.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.init import normal_
    from transformers import AutoModel

    shutil.copytree(golden_dir / "tiny_llama", root / BASE)
    torch.manual_seed(1)
    for name in (FIRST_STAGE, PUBLISHED):
        base = AutoModel.from_pretrained(golden_dir / "tiny_llama")
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                normal_(parameter, std=0.3)
        model.save_pretrained(str(root / name))
        file = root / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": BASE}))
        (root / name / "llm2vec_config.json").write_text(
            json.dumps({"pooling_mode": "mean", "max_length": 512, "skip_instruction": True})
        )
    return root / PUBLISHED


def small_data(folder: Path) -> Path:
    """A folder of data with a handful of graded pairs, for a quality gate of a second."""
    (folder / "stsb").mkdir(parents=True)
    animals = ("cat", "dog", "horse", "bird", "cow", "fish")
    rows = [
        f"A {one} is running.\tA {other} is {'awake' if one == other else 'asleep'}.\t{5.0 if one == other else at % 4}"
        for at, one in enumerate(animals)
        for other in animals
    ]
    for part in ("train", "dev", "test"):
        (folder / "stsb" / f"{part}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    return folder
