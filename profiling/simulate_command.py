"""``deepfuse simulate``: predict a step of a model on a cluster."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from deepfuse.ir.link import Link
    from deepfuse.profiling.cluster import Cluster


@dataclass(kw_only=True)
class Simulate:
    """Predict a step on a cluster: time by part, exposed communication, memory of a GPU, and the overlap that pays.

    Several numbers of expert ranks make a row each; of a single one the parts are shown as well.
    """

    model: Positional[str]
    """Checkpoint directory, of which config.json is read, or preset."""
    phase: Literal["prefill", "decode", "train"] = "decode"
    expert: tuple[int, ...] = (32,)
    """Ranks that share the routed experts."""
    data: int = 1
    tensor: int = 1
    sequences: int = 128
    """Of each rank of the data and expert axes, in a step."""
    length: int = 4096
    """Tokens of each sequence; in decode, those in the cache."""
    quantize: Literal["fp8", "none"] = "fp8"
    redundant: int | None = None
    """Further copies of experts, over all ranks; as few as make the experts divide, where it is not given."""
    imbalance: float | None = None
    """Rows of the busiest rank over the mean; what chance makes of it, where it is not given."""
    exchange: Literal["auto", "direct", "node_limited"] = "auto"
    """A row for each expert of a token, or one for each node; auto: direct in decode."""
    device: str = "H800"
    """A row of devices: H100, H800, H200, B200 or cpu."""
    gpus_per_node: int = 8
    nvlink: str = "NVLink H800"
    """A row of links, or GB/S,MICROSECONDS: line rate one way, and latency."""
    network: str = "InfiniBand 400"
    """Likewise, of the network for each GPU."""
    calibration: Path | None = None
    """JSON of microbenchmarks, whose rates are taken as they are."""
    json: bool = False
    plot: Path | None = None
    """Figure to write, an .svg."""

    def run(self) -> None:
        from rich.console import Console

        from deepfuse.profiling.simulate import Setup, Simulation
        from deepfuse.profiling.simulate_views import figure, parts_table, setups_table
        from deepfuse.runtime.source import folder_and_config

        if self.plot is not None and (self.plot.suffix != ".svg" or not self.plot.parent.is_dir()):
            raise ValueError(f"simulate: want --plot to be an .svg in a folder that exists, got {self.plot}")
        if not self.expert:
            raise ValueError("simulate: want a number of expert ranks at least, got none")
        cluster = self._cluster()
        config = folder_and_config(self.model)[1]
        simulation = Simulation(config, cluster)
        setups = [
            Setup(
                phase=self.phase,
                sequences=self.sequences,
                length=self.length,
                expert=expert,
                tensor=self.tensor,
                data=self.data,
                fp8=self.quantize == "fp8",
                redundant=-(config.n_routed_experts or 0) % max(expert, 1)
                if self.redundant is None
                else self.redundant,
                imbalance=self.imbalance,
                exchange=None if self.exchange == "auto" else self.exchange,
            )
            for expert in self.expert
        ]
        # half a minute of silence would look as if nothing happened; off a terminal it prints nothing
        with Console(stderr=True).status("capturing the graphs of a rank"):
            predictions = simulation.predict_all(setups)
        if self.plot is not None:
            self.plot.write_text(figure(predictions, cluster))
        if self.json:
            print(json.dumps({"predictions": [p.to_json() for p in predictions]}))
            return
        console = Console()
        console.print(setups_table(predictions, cluster))
        if len(predictions) == 1:
            console.print(parts_table(predictions[0]))

    def _cluster(self) -> "Cluster":
        from deepfuse.ir.device import DEVICES
        from deepfuse.profiling.calibration import calibrated
        from deepfuse.profiling.cluster import Cluster, sustained, sustained_link

        if self.device not in DEVICES:
            raise ValueError(f"simulate: want a device out of {', '.join(DEVICES)}, got {self.device!r}")
        cluster = Cluster(
            device=sustained(DEVICES[self.device]),
            gpus_per_node=self.gpus_per_node,
            nvlink=sustained_link(_link("nvlink", self.nvlink)),
            network=sustained_link(_link("network", self.network)),
        )
        return cluster if self.calibration is None else calibrated(cluster, self.calibration)


def _link(name: str, text: str) -> "Link":
    from deepfuse.ir.link import LINKS, Link

    if text in LINKS:
        return LINKS[text]
    try:
        bandwidth, latency = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"simulate: want --{name} out of {', '.join(LINKS)}, or GB/S,MICROSECONDS, got {text!r}"
        ) from None
    return Link(name=name, bandwidth=bandwidth * 1e9, latency=latency * 1e-6)
