"""torchvision, imported so that it also loads beside another build of torch."""

from fusedres.testing import import_torchvision

torchvision = import_torchvision()

from torchvision.models import resnet  # noqa: E402
from torchvision.models.quantization.resnet import resnet18 as quantizable_resnet18  # noqa: E402
from torchvision.ops.misc import FrozenBatchNorm2d  # noqa: E402

__all__ = ["FrozenBatchNorm2d", "quantizable_resnet18", "resnet", "torchvision"]
