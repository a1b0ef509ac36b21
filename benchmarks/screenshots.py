r"""What the pages of a model and of a training look like, for the documentation:

make demo && python -m benchmarks.screenshots runs/demo/report.html
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import tyro

from benchmarks.viewer import chromium
from pyg_attnpool import MorphableModel
from pyg_attnpool.files import replacing

DEVIATIONS = (1.0, -0.6, 0.8, 0.5, -0.8, 0.4, 0.6, -0.5)  # a face that is not the mean


def main(
    report: Annotated[Path, tyro.conf.Positional],
    output: Path = Path(__file__).parents[1] / "docs" / "images",
):
    r"""Takes the pictures.

    Args:
        report: The page of a training.
        output: Folder of the pictures.
    """
    with chromium() as browser, TemporaryDirectory() as folder:
        path = Path(folder) / "faces.html"
        model = MorphableModel.from_pretrained("faces")
        model.export(path)
        code = model.latent_mean + model.latent_std * torch.tensor(DEVIATIONS)
        for name, source, width, height in (
            ("page", path, 1200, 760),
            ("page-dark", path, 390, 844),
            ("report", report.resolve(), 1200, 760),
        ):
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if name.endswith("dark") else "light",
                reduced_motion="reduce",
            )
            page.goto(source.as_uri())
            page.wait_for_function("(window.viewer ?? window.report) !== undefined")
            if source == path:
                page.evaluate("code => viewer.setCode(code)", code.tolist())
            else:
                page.evaluate("document.querySelector('#maps').scrollIntoView()")
            page.wait_for_timeout(1000)  # until meshes are drawn
            with replacing(output / f"{name}.png") as temporary:
                temporary.write_bytes(page.screenshot(type="png"))
            page.close()


if __name__ == "__main__":
    tyro.cli(main)
