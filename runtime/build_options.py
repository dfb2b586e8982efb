"""How the command line's model is built: options that its commands share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from deepfuse.runtime.training import Training


@dataclass(kw_only=True)
class BuildOptions:
    """How the model is built."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """auto (the checkpoint's), float32, bfloat16 or float16."""
    quantize: Literal["auto", "none", "fp8", "fp8_weights"] = "auto"
    """fp8: weights and activations; fp8_weights: weights alone; auto: as the checkpoint is; none: dequantize."""
    max_batch_size: int = 1
    max_seq_len: int | None = None
    cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of the latent cache: auto (that of the activations) or fp8."""
    without: tuple[str, ...] = ()
    """Passes to leave out."""
    providers: tuple[str, ...] = ()
    """op=provider, to force one."""
    compile: bool = True
    """Compile with Inductor; otherwise run the rewritten graphs as they are."""

    @property
    def passes(self) -> Any:
        """The pipeline: the default one without those left out."""
        from deepfuse.passes.pipeline import default

        return default().without(*self.without)

    def check_pass(self, name: str) -> None:
        """Raise the error of a name that is no pass of the pipeline, before a build."""
        self.passes.without(name)

    def build(self, model: str, *, training: "Training | None" = None) -> Any:
        """The model; with ``training`` its trainer, to which batch size, length and dtype of the cache mean nothing."""
        from deepfuse.runtime.build import build

        forced = {}
        for item in self.providers:
            name, equals, provider = item.partition("=")
            if not equals:
                raise ValueError(f"--providers: want op=provider, got {item!r}")
            forced[name] = provider
        return build(
            model,
            device=self.device,
            dtype=self.dtype,
            quantize=None if self.quantize == "none" else self.quantize,
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
            cache_dtype=self.cache_dtype,
            passes=self.passes,
            providers=forced,
            compile=self.compile,
            training=training,
        )
