"""Where the paper's configs are: by the words of the flags, beside the user or beside the package."""

from pathlib import Path

FOLDERS = (Path("configs"), Path(__file__).parents[3] / "configs")  # the working folder's, then the source tree's
MODELS = {"roberta": "roberta_base", "t5": "t5_base", "llama": "llama2_7b"}
DATASETS = {"squad": "squad_v2"}


def find_preset(model_type: str, dataset: str) -> Path:
    """The config of a model and a data set of the paper, such as ``configs/roberta_base_sst2.yaml``.

    Args:
        model_type: "roberta", "t5", "llama", or what the name of a config begins with.
        dataset: "sst2", "mnli", "squad", ..., or what it ends with.

    Raises:
        FileNotFoundError: there is none; those that there are, are named.
    """
    name = f"{MODELS.get(model_type, model_type)}_{DATASETS.get(dataset, dataset.rpartition('/')[2])}.yaml"
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    there = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
    known = f"there are {', '.join(there)}" if there else "a source checkout has them in configs/"
    raise FileNotFoundError(f"config: no preset {name} for --model_type and --dataset; {known}; or give a config file")
