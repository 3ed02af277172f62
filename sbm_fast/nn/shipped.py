"""The network whose weights come with the package."""

from importlib.resources import as_file, files

from sbm_fast.nn.unet import UNet


def digits() -> UNet:
    """A small U-Net of real handwritten digits: [B, 1, 8, 8] in [−1, 1], trained by score matching.

    Trained with `sbm-fast train digits` on the UCI digits that scikit-learn bundles (1797 images);
    the file's metadata holds the command and the held-out loss.
    """
    with as_file(files("sbm_fast") / "weights" / "digits.safetensors") as path:
        return UNet.load(path)
