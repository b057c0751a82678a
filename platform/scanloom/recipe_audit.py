"""What a recipe says of the audit: how copies are looked for, and how much of a dataset is looked at."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from scanloom.section import Count, DataParallel, Positive, Section

Arm = Literal["real", "synthetic", "real and synthetic", "synthetic, then real"]
"""From what a classifier learns."""
ARMS: tuple[Arm, ...] = get_args(Arm)


class CopyDetection(DataParallel):
    """The encoder that copies are looked for with, trained on the corpus, and what it is asked for."""

    size_px: Annotated[int, Field(ge=32)] = 96
    """It looks at squares of this side, or of the corpus's where that is smaller."""
    channels: Annotated[tuple[Count, ...], Field(min_length=2)] = (16, 32, 64, 128)
    """Each level halves the side; those that would leave fewer than 4 px are left out."""
    width: Count = 128
    """Values of an embedding."""
    temperature: Positive = 0.05
    steps: Count = 800
    batch_size: Annotated[int, Field(ge=4)] = 64
    """Scans of a step, all of them seen twice; those of one worker are told from each other."""
    learning_rate: Positive = 2e-3
    max_scans: Count = 50000
    """Of the train split; all of them are looked up, so that with fewer a copy of the rest is not found."""
    false_positive_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """Of held-out patients, at most so many may have a scan that counts as a copy."""
    planted_scans: Count = 512
    """Of so many training scans copies are planted, to see how many are found."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.workers or self.batch_size // self.workers < 4:
            raise ValueError(
                f"batch_size {self.batch_size} does not give each of {self.workers} workers at least 4 scans"
            )
        return self


class MembershipInference(Section):
    """The attack on the generator by someone who holds it and a scan."""

    scans: Count = 500
    """Of the train split, and as many of held-out patients."""
    use_gpu: bool = False


class Fidelity(Section):
    """What else than the audit's own encoder looks at how alike the images are to real ones."""

    backbone: str | None = None
    """A given network: a folder in transformers' format, a hub id or a TorchScript file, by path or store URI."""
    images: Count = 5000
    """Of the dataset, of the train split and of the held-out splits, at most so many are shown to it."""
    radiomics: bool = False
    """The Fréchet Radiomic Distance too; needs the extra `frd`."""
    radiomics_images: Count = 200
    """Of each, at most so many; one takes about a second."""
    use_gpu: bool = False


class Fairness(Section):
    """For which groups of people the audit tells its figures apart."""

    groups: tuple[str, ...] | None = None
    """Attributes whose values, or bands of whose number, make groups alone and all together; None: the first three
    that are categories or numbers."""


class UtilityStudy(Section):
    """Classifiers trained on real and on synthetic images, and tested on held-out scans."""

    labels: tuple[str, ...] | None = None
    """What they read, as `findings=Effusion`; None: every label. Those too rare to test are left out, by name."""
    seeds: Count = 5
    """So many classifiers of each kind; of fewer than three little is known of how far they spread."""
    steps: Count = 400
    """Of every classifier, whatever it learns from; where it learns from one and then the other, half of them each."""
    batch_size: Annotated[int, Field(ge=4)] = 32
    learning_rate: Positive = 2e-3
    size_px: Annotated[int, Field(ge=32)] = 64
    """It looks at squares of this side, or of the corpus's where that is smaller."""
    backbone: str | None = None
    """A given network, as in `fidelity`: its vectors are read by a linear layer. None: MONAI's DenseNet, small."""
    least_patients: Count = 10
    """A label counts where so many held-out patients have it and so many have not."""
    images: Count = 5000
    """Of the train split, of the held-out splits, and of the dataset, at most so many."""
    use_gpu: bool = False


class Audit(Section):
    """What is measured of a dataset before it may leave."""

    copies: CopyDetection = CopyDetection()
    membership: MembershipInference | None = MembershipInference()
    """None: not measured."""
    fidelity: Fidelity = Fidelity()
    fairness: Fairness = Fairness()
    utility: UtilityStudy | None = UtilityStudy()
    """None: not measured."""
    images: Count = 10000
    """Of the dataset, at most so many are looked at, spread over all of it."""
    pairs: Count = 12
    """The images that are most alike to a training scan, shown beside it for whoever may see both."""
