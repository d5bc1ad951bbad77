"""Registration and composition: what is offered, how its settings arrive, and every refusal by its message."""

import subprocess
import sys
from enum import Enum
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import core
from core import (
    AnyUp,
    Attention,
    Context,
    Decoder,
    Learner,
    Objective,
    build,
    build_filler,
    compose,
    register,
    registry,
)
from core.attention import WindowAttention
from core.hooks import HOOK_POINTS, Filler
from core.unifiers import LearnedBasis, Ordering

pytestmark = pytest.mark.usefixtures("own_registry")
SMALL = ["embed_dim=16", "unifier.num_basis=8"]


class Shade(Enum):
    """Names and values differ, so that mixing them up shows."""

    light = 1
    dark = 2


def decoder(**namespace) -> type[Decoder]:
    """A decoder class that keeps the output; `namespace` adds or replaces attributes."""

    def __init__(self, embed_dim: int):
        Decoder.__init__(self)

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output

    return type("Idea", (Decoder,), {"__init__": __init__, "forward": forward, "__module__": __name__, **namespace})


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, 16, 20, generator=generator), torch.randn(1, 4, 3, 4, generator=generator)


# --- registering -----------------------------------------------------------------------------------------------------


def test_a_registered_idea_is_a_choice():
    @register("scaled")
    class Scaled(Decoder):
        def __init__(self, embed_dim: int, factor: float = 2.0):
            super().__init__()
            self.factor = factor

        def forward(self, output: Tensor, context: Context) -> Tensor:
            return output * self.factor

    assert registry.choices("decoder")["scaled"] is Scaled
    assert "decoder=scaled  (settings: factor)" in core.available()
    baseline = build(SMALL)(*inputs())
    assert torch.equal(build([*SMALL, "decoder=scaled"])(*inputs()), baseline * 2)
    assert torch.equal(build([*SMALL, "decoder=scaled", "decoder.factor=3"])(*inputs()), baseline * 3)
    assert compose(["decoder=scaled"]).decoder == {"name": "scaled", "factor": 2.0}


def test_the_decorator_returns_the_class():
    cls = decoder()
    assert register("idea")(cls) is cls


CELL = """
from torch import Tensor
from core import Context, Decoder, register

@register("mine")
class Mine(Decoder):
    def __init__(self, embed_dim: int, shift: float = {shift}):
        super().__init__()
        self.shift = shift

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output + self.shift
"""


def test_a_notebook_cell_can_be_run_again():
    """The last definition counts, and its new default too."""
    notebook = {"__name__": "__main__"}
    baseline = build(SMALL)(*inputs())
    for shift in (1.0, 1.0, 5.0):
        exec(CELL.format(shift=shift), notebook)
        assert torch.equal(build([*SMALL, "decoder=mine"])(*inputs()), baseline + shift)
    assert registry.choices("decoder")["mine"] is notebook["Mine"]


def test_another_class_of_the_same_name_is_refused():
    register("taken")(decoder())
    with pytest.raises(
        ValueError, match=r"decoder=taken is already registered by test_registry.Idea; .*Other needs another name.*none"
    ):
        register("taken")(decoder(__qualname__="Other"))
    with pytest.raises(ValueError, match=r"unifier=learned_basis is already registered by core.unifiers.LearnedBasis"):

        @register("learned_basis")
        class Mine(core.Unifier):
            def __init__(self, embed_dim: int):
                super().__init__()

            def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
                return guidance

    assert registry.choices("unifier")["learned_basis"] is LearnedBasis


def test_hook_points_have_namespaces_of_their_own():
    register("sgd")(decoder())
    assert registry.choices("learner")["sgd"] is not registry.choices("decoder")["sgd"]


class NotOne(nn.Module):
    pass


class NewHookPoint(Filler):
    hook = "postprocessor"


@pytest.mark.parametrize("cls", [NotOne, Filler, NewHookPoint, lambda embed_dim: None, dict, "window"], ids=range(6))
def test_what_fills_no_hook_point_is_refused(cls):
    with pytest.raises(
        TypeError, match=r"fills no hook point: subclass one of Unifier, Attention, Decoder, Refiner, Te"
    ):
        register("thing")(cls)


@pytest.mark.parametrize("base", HOOK_POINTS.values())
def test_a_hook_point_itself_is_no_filler(base):
    """Its abstract methods are missing."""
    with pytest.raises(TypeError, match="abstract"):
        base()


def takes(signature: str) -> type[Decoder]:
    namespace = {"Decoder": Decoder, "Shade": Shade}
    exec(f"def __init__(self, {signature}): Decoder.__init__(self)", namespace)
    return decoder(__init__=namespace["__init__"])


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("embed_dim: int, depth=3", r"Idea.__init__: argument depth needs a type annotation"),
        ("embed_dim: int, *sizes: int", r"Idea.__init__ takes \*sizes: name every setting"),
        ("embed_dim: int, **rest: int", r"Idea.__init__ takes \*+rest: name every setting"),
        ("embed_dim: int, name: str = 'x'", r"Idea.__init__.*name"),
    ],
)
def test_signatures_that_are_no_configuration_are_refused(signature, message):
    with pytest.raises(TypeError, match=message):
        register("bad")(takes(signature))
    assert "bad" not in registry.choices("decoder")


def test_sizes_of_the_core_are_no_settings():
    assert registry.signature_fields(takes("embed_dim: int, depth: int = 3")) == {"depth": (int, 3)}
    assert registry.signature_fields(takes("embed_dim, depth: int = 3")) == {"depth": (int, 3)}  # needs no type


def test_training_fillers_need_no_init():
    @register("fixed")
    class Fixed(Objective):
        def forward(self, model: nn.Module, batch: core.Batch) -> dict[str, Tensor]:
            return {"my_loss": torch.zeros(())}

    @register("idle")
    class Idle(Learner):
        def __init__(self, patience: int = 2):
            super().__init__()
            self.patience = patience

        def forward(self, model, objective, tasks):
            return []

        def step(self, trainable, tasks, optimizer):
            return []

    config = compose(["objective=fixed", "learner=idle", "learner.patience=7"])
    assert type(build_filler("objective", config.objective)) is Fixed
    assert build_filler("learner", config.learner).patience == 7


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def typed() -> dict:
    """Registers `decoder=typed` with a setting of every kind; holds what its latest instance was given."""
    found = {}

    @register("typed")
    class Typed(Decoder):
        def __init__(
            self,
            embed_dim: int,
            shade: Shade = Shade.light,
            sizes: tuple[int, ...] = (4, 8),
            pair: tuple[int, int] = (1, 2),
            limit: float | None = None,
            flag: bool = False,
            label: str = "a b",
            weights: list[float] = [1.0, 2.0],  # noqa: B006  never changed
        ):
            super().__init__()
            found.update({key: value for key, value in locals().items() if key not in ("self", "__class__", "found")})

        def forward(self, output: Tensor, context: Context) -> Tensor:
            return output

    return found


DEFAULTS = {
    "embed_dim": 16,
    "shade": Shade.light,
    "sizes": (4, 8),
    "pair": (1, 2),
    "limit": None,
    "flag": False,
    "label": "a b",
    "weights": [1.0, 2.0],
}


def test_settings_arrive_as_declared(typed):
    build([*SMALL, "decoder=typed"])
    assert typed == DEFAULTS
    changed = [
        "decoder.shade=dark",
        "decoder.sizes=[1,2,3]",
        "decoder.pair=[3,4]",
        "decoder.limit=2",
        "decoder.flag=true",
        "decoder.label='c: d'",
        "decoder.weights=[]",
    ]
    build([*SMALL, "decoder=typed", *changed])
    assert typed == {
        "embed_dim": 16,
        "shade": Shade.dark,
        "sizes": (1, 2, 3),
        "pair": (3, 4),
        "limit": 2.0,
        "flag": True,
        "label": "c: d",
        "weights": [],
    }
    assert type(typed["sizes"]) is tuple
    assert type(typed["limit"]) is float


def test_settings_survive_a_checkpoint(typed, tmp_path):
    """Typed settings go through JSON and arrive as declared again."""
    model = build([*SMALL, "decoder=typed", "decoder.shade=dark", "decoder.sizes=[5]", "decoder.limit=0.25"])
    expected = dict(typed)
    core.save(model, tmp_path / "model.safetensors")
    typed.clear()
    loaded = core.load(tmp_path / "model.safetensors")
    assert typed == expected
    assert loaded.config == model.config


@pytest.mark.parametrize(
    "override",
    [
        "decoder.shade=blue",
        "decoder.sizes=[a]",
        "decoder.sizes=3",
        "decoder.limit=much",
        "decoder.flag=7.5",
        "decoder.weights={a: 1}",
    ],
)
def test_settings_of_another_type_are_refused(typed, override):
    with pytest.raises(
        ValueError, match=rf"(?s){override.split('=')[0]}.*There is:.*decoder=typed  \(settings: shade, sizes"
    ):
        build([*SMALL, "decoder=typed", override])


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("shade", "blue", "decoder=typed: shade must be one of light, dark, got 'blue'"),
        ("shade", [], "decoder=typed: shade must be one of light, dark, got \\[\\]"),
        ("sizes", ["a"], r"decoder=typed: sizes must be tuple\[int, \.\.\.\], got \['a'\]"),
        ("sizes", 3, r"decoder=typed: sizes must be tuple\[int, \.\.\.\], got 3"),
        ("limit", "much", "decoder=typed: limit must be float.*, got 'much'"),
        ("flag", 7.5, "decoder=typed: flag must be bool, got 7.5"),
        ("label", {"a": 1}, "decoder=typed: label must be str, got {'a': 1}"),
    ],
)
def test_a_configuration_with_values_of_another_type_is_refused(typed, setting, value, message):
    """One that came from no Hydra: hook point, setting and value are named, and what it may be."""
    config = build([*SMALL, "decoder=typed"]).config
    config["decoder"][setting] = value
    with pytest.raises(ValueError, match=message):
        core.from_config(config)
    with pytest.raises(ValueError, match="cosine_mse: self_consistency must be float, got 'much'"):
        build_filler("objective", {"name": "cosine_mse", "self_consistency": "much"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": None}, "attention must be {name: NAME, SETTING: VALUE}, got None"),
        ({"attention": "global"}, "attention must be {name: NAME, SETTING: VALUE}, got 'global'"),
        ({"attention": {"num_heads": 4}}, "attention must be {name: NAME, SETTING: VALUE}, got {'num_heads': 4}"),
        ({"embed_dim": "16"}, "embed_dim must be int, got '16'"),
    ],
)
def test_a_configuration_of_another_form_is_refused(change, message):
    config = build(SMALL).config
    with pytest.raises(ValueError, match=message):
        core.from_config(config | change)


def test_a_configuration_that_is_none_or_not_whole_is_refused():
    config = build(SMALL).config
    with pytest.raises(ValueError, match=r"the configuration has no unifier, decoder: core\.compose"):
        core.from_config({key: config[key] for key in ("attention", "refiner", "temporal")})
    with pytest.raises(ValueError, match=r"a model's configuration must be a mapping .*, got 3"):
        core.from_config(3)


def test_a_configuration_without_a_required_setting_is_refused():
    register("needy")(takes("embed_dim: int, depth: int"))
    with pytest.raises(ValueError, match=r"decoder=needy needs a value for depth: set decoder\.depth=\.\.\."):
        core.from_config(build(SMALL).config | {"decoder": {"name": "needy"}})


@pytest.mark.parametrize(
    "override", ["embed_dim=wide", "seed=abc", "compile=maybe", "check_finite=no", "check_finite=3", "seed=1.5"]
)
def test_top_level_keys_of_another_type_are_refused(override):
    """`check_finite=no` must not mean yes."""
    with pytest.raises(ValueError, match=rf"(?s){override.split('=')[0]}.*There is:"):
        build([*SMALL, override])


def test_a_required_setting_must_be_given():
    register("needy")(takes("embed_dim: int, depth: int"))
    assert type(build([*SMALL, "decoder=needy", "decoder.depth=3"]).decoder).__name__ == "Idea"
    with pytest.raises(ValueError, match=r"(?s)decoder.*depth"):
        build([*SMALL, "decoder=needy"])


def test_enum_settings_are_given_by_name():
    for ordering in Ordering:
        assert build([*SMALL, f"unifier.ordering={ordering.name}"]).unifier.encoder[0].ordering is ordering


# --- unknown names, keys, groups -------------------------------------------------------------------------------------

LISTED = r".*There is:.*embed_dim, seed, compile, check_finite.*unifier=learned_basis  \(settings: num_basis, ker"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("attention=globl", "attention/globl"),
        ("atention=global", "atention"),
        ("unifier.num_base=3", "unifier.num_base"),
        ("unifier.num_basis=many", "unifier.num_basis"),
        ("num_heads=3", "num_heads"),
        ("attention.num_heads", "attention.num_heads"),
        ("=", "override"),
        ("attention=", "attention"),
        ("unifier={a: 1}", "unifier"),
    ],
)
def test_unknown_overrides_list_what_there_is(override, named):
    with pytest.raises(ValueError, match=f"(?s){named}{LISTED}"):
        build([override])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("unifier.num_basis=many", r"\bint\b|Integer"),
        ("attention.window_ratio=wide", r"\bfloat\b|Float"),
        ("unifier.ordering=sorted", r"paper, released"),
    ],
)
def test_a_wrong_type_says_which_is_right(override, expected):
    with pytest.raises(ValueError, match=rf"(?s){override.split('=')[0]}.*({expected}).*There is:"):
        build([override])


def test_overrides_must_be_a_list():
    with pytest.raises((TypeError, ValueError), match="list"):
        build("attention=global")


def test_a_failed_composition_leaves_nothing_behind():
    with pytest.raises(ValueError, match="There is"):
        build(["attention=globl"])
    assert build([*SMALL, "attention=global"]).config["attention"]["name"] == "global"


def test_unknown_names_in_a_configuration():
    config = build(SMALL).config
    with pytest.raises(ValueError, match=r"attention=globl is not registered; there are: .*global, .*window"):
        core.from_config(config | {"attention": {"name": "globl"}})
    with pytest.raises(ValueError, match=r"attention=global has no setting window_ratio; it has: num_heads"):
        core.from_config(config | {"attention": {"name": "global", "window_ratio": 0.1}})
    with pytest.raises(ValueError, match=r"decoder=none has no setting depth; it has: no settings"):
        core.from_config(config | {"decoder": {"name": "none", "depth": 1}})
    with pytest.raises(ValueError, match="no hook point is called 'encoder'; there are: unifier, attention, decoder"):
        registry.choices("encoder")


def test_building_inside_a_hydra_application(tmp_path):
    """`build` uses the application's own search path, and leaves it initialised."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(tmp_path), version_base=None):
        assert build([*SMALL, "attention=global"]).config["attention"]["name"] == "global"
        assert GlobalHydra.instance().is_initialized()
    assert not GlobalHydra.instance().is_initialized()


# --- factories -------------------------------------------------------------------------------------------------------


def test_partial_factories():
    model = AnyUp(attention=partial(WindowAttention, num_heads=2), embed_dim=16)
    assert model.config["attention"] == {"name": "window", "num_heads": 2, "window_ratio": 0.1}
    same = build(["embed_dim=16", "attention.num_heads=2"])
    assert model.config == same.config
    with torch.no_grad():
        assert torch.equal(model(*inputs()), same(*inputs()))


def test_nested_partials_and_subclasses():
    once = partial(partial(WindowAttention, num_heads=2), window_ratio=0.3)
    config = AnyUp(attention=once, embed_dim=16).config["attention"]
    assert config == {"name": "window", "num_heads": 2, "window_ratio": 0.3}


class Unregistered(WindowAttention):
    pass


@pytest.mark.parametrize(
    "factory",
    [Unregistered, partial(Unregistered, num_heads=2), lambda embed_dim: WindowAttention(embed_dim)],
    ids=["a subclass", "a partial of it", "a function"],
)
def test_what_no_configuration_could_rebuild_works_but_is_not_described(factory):
    model = AnyUp(attention=factory, embed_dim=16)
    assert model(*inputs()).shape == (1, 4, 16, 20)
    with pytest.raises(TypeError, match=r"is not a registered filler with keyword settings: decorate its class with"):
        _ = model.config


def test_positional_arguments_are_not_described():
    with pytest.raises(TypeError, match="keyword settings"):
        registry.describe(partial(WindowAttention, 16))


def test_a_partial_of_a_wrong_setting_fails_at_once():
    with pytest.raises(TypeError, match="num_head"):
        AnyUp(attention=partial(WindowAttention, num_head=2))


# --- discovery -------------------------------------------------------------------------------------------------------

PACKAGE = """
from torch import Tensor
from core import Attention, register

@register("nearest_of_another_package")
class Nearest(Attention):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value[..., :1, :1].expand(*value.shape[:2], *query.shape[-2:])
"""


def test_installed_packages_are_found_by_their_entry_point(tmp_path, monkeypatch):
    (tmp_path / "nearest_idea.py").write_text(PACKAGE)
    info = tmp_path / "nearest_idea-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nearest-idea\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[anyup_lab.fillers]\nidea = nearest_idea\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "nearest_of_another_package" in registry.choices("attention")
    assert isinstance(build([*SMALL, "attention=nearest_of_another_package"]).attention, Attention)
    sys.modules.pop("nearest_idea")


def test_this_project_offers_its_extensions():
    from importlib.metadata import entry_points

    found = [point for point in entry_points(group=registry.ENTRY_POINT_GROUP) if point.value == "extensions"]
    assert found, "the project is not installed (pip install -e .), or pyproject.toml lost its entry point"


# --- importing -------------------------------------------------------------------------------------------------------

OPTIONAL = (
    "diffusers",
    "experiments",
    "extensions",
    "gym",
    "learn2learn",
    "matplotlib",
    "mlflow",
    "pandas",
    "scipy",
    "skimage",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
)
IMPORT = """
import sys, time
import torch
known, start = set(sys.modules), time.perf_counter()
import core
print(time.perf_counter() - start)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - known}))
"""


def _import_the_core() -> tuple[float, set[str]]:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=300)
    seconds, names = done.stdout.splitlines()
    return float(seconds), set(names.split())


def test_importing_the_core_does_not_import_the_compiler():
    """It takes longer than all else of the core, and only `torch.compile` needs it."""
    code = "import sys, core; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"


def test_importing_the_core_pulls_in_no_optional_package():
    _, packages = _import_the_core()
    assert "core" in packages
    assert not packages & set(OPTIONAL)


@pytest.mark.slow
def test_importing_the_core_is_quick():
    """At most 2 s beyond torch itself. Best of three, and slow: a time says something only on a quiet machine."""
    assert min(_import_the_core()[0] for _ in range(3)) < 2


def test_importing_the_core_warns_of_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import core"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
