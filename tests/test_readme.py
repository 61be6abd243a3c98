"""The reports that the README shows are what fuse prints, of the same networks without their weights."""

import re
from pathlib import Path

import hugging_face
import optional
import pytest
from torchvision_models import torchvision

import fusedres

README = Path(__file__).parents[1] / "README.md"
# what makes the model -> the same model, not downloaded
MODELS = {
    "torchvision.models.resnet18(weights=": lambda: torchvision.models.resnet18(),
    "timm.create_model(": lambda: optional.package("timm").create_model("seresnet50", drop_path_rate=0.1),
    "transformers.ResNetModel.": lambda: hugging_face.modeling().ResNetModel(hugging_face.modeling().ResNetConfig()),
}


@pytest.mark.parametrize("made", MODELS)
def test_a_report_is_what_fuse_prints(made):
    shown = re.search(
        rf"```python\nmodel = {re.escape(made)}[^`]*print\(report\)\n```\n\n```\n([^`]*)```", README.read_text()
    )
    assert shown is not None
    printed = str(fusedres.fuse(MODELS[made](), strict=True)).splitlines()
    beginning, _, end = shown[1].rstrip().partition("\n...\n")
    beginning, end = beginning.splitlines(), end.splitlines()
    assert [line.split() for line in printed[: len(beginning)]] == [line.split() for line in beginning]
    assert printed[len(printed) - len(end) :] == end and (end or len(printed) == len(beginning))
