"""Names of tasks that several packages share: evaluation writes them, and reports look them up."""

TRAIN = "train"
HESSIAN = "hessian"
SURFACES = ("surface_1d", "surface_2d")  # of the loss, along one direction and two
EFFICIENCY = "efficiency"
SALIENCY = "saliency"  # what a model looks at
OOD = "ood"  # averages over the data sets of stimuli, of which each is OOD/SET
DISTORTED = "distorted"  # DISTORTED/DATA SET/DISTORTION

PROTOCOLS = LANCZOS, PARK_KIM, POWER = "lanczos", "park-kim", "power"  # how eigenvalues are found

HUMANS = "humans"  # the model that people's own rows carry


def of_ood(dataset: str) -> str:
    """Return the task of one data set of stimuli."""
    return f"{OOD}/{dataset}"


def is_ood_set(task: str) -> bool:
    return task.startswith(f"{OOD}/")


def of_distorted(dataset: str, distortion: str) -> str:
    """Return the task of one distortion of a data set."""
    return f"{DISTORTED}/{dataset}/{distortion}"


def is_distorted(task: str) -> bool:
    return task.startswith(f"{DISTORTED}/")


def family_of(task: str) -> str:
    """Return a task's family: the distorted data set of a distortion; for others everything before the last slash.

    >>> family_of("distorted/cifar10/imagenet-c/fog"), family_of("ood/edge"), family_of("digits")
    ('distorted/cifar10', 'ood', '')
    """
    return "/".join(task.split("/")[:2]) if is_distorted(task) else task.rpartition("/")[0]
