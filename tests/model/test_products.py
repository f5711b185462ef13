"""Products accumulate in f32 in whatever form they are done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.model import products
from gemma4_jax.model.layers import matmul
from gemma4_jax.model.products import WIDE, product

FORMS = {  # operands of rows m, columns n and depth 96
    "mi,oi->mo": lambda m, n: ((m, 96), (n, 96)),
    "mi,io->mo": lambda m, n: ((m, 96), (96, n)),
    "...i,oi->...o": lambda m, n: ((2, m // 2, 96), (n, 96)),
    "mi,mo->oi": lambda m, n: ((96, m), (96, n)),
    "bkmc,bksc->bkms": lambda m, n: ((2, 3, m, 96), (2, 3, n, 96)),
    "bkms,bksh->bkmh": lambda m, n: ((2, 3, m, 96), (2, 3, 96, n)),
}


def operands(form, m, n, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in FORMS[form](m, n)]


def dots(function, *args):
    """Input dtypes of the matrix products that are compiled."""
    text = jax.jit(function).lower(*args).as_text()
    return [line.split(" : (")[1].split(")")[0] for line in text.splitlines() if "stablehlo.dot_general" in line]


@pytest.fixture
def units(monkeypatch, request):
    """A CPU with bf16 units, or without."""
    monkeypatch.setattr(products, "has_bf16_units", lambda: request.param)


@pytest.mark.parametrize("units", [True, False], indirect=True)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [2, WIDE])
def test_equals_f64(units, form, dtype, rows):
    x, y = operands(form, rows, 2 * WIDE, dtype)
    found = product(form, x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.einsum(form, np.float64(x), np.float64(y)), atol=3e-5)


@pytest.mark.parametrize("units", [False], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_only_wide_products_of_bf16_are_widened(units, form):
    """On CPU, where few rows are read faster as they are; both sides count."""
    for m, n, kind in ((WIDE, WIDE, "xf32"), (WIDE - 2, 4 * WIDE, "xbf16"), (4 * WIDE, WIDE - 2, "xbf16")):
        (found,) = dots(lambda x, y: product(form, x, y), *operands(form, m, n, jnp.bfloat16))
        assert found.count(kind) == 2, (m, n, found)


@pytest.mark.parametrize("units", [True], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_bf16_units_are_used(units, form):
    """Sums over the first axis of both operands get one more axis."""
    (found,) = dots(lambda x, y: product(form, x, y), *operands(form, WIDE, WIDE, jnp.bfloat16))
    assert found.count("xbf16") == 2
    assert found.count("<1x") == (2 if form == "mi,mo->oi" else 0)


def test_what_linux_says_of_the_cpu(monkeypatch, tmp_path):
    for name, text in {"units": "fma avx512_bf16 amx_bf16", "none": "fma avx512f", "no file": None}.items():
        listed = tmp_path / name
        if text is not None:
            listed.write_text(f"flags : {text}\n")
        monkeypatch.setattr(products, "Path", lambda _, listed=listed: listed)
        products.has_bf16_units.cache_clear()
        assert products.has_bf16_units() is (name == "units")
    products.has_bf16_units.cache_clear()


@pytest.mark.parametrize("units", [False], indirect=True)
def test_other_backends_and_meshes_keep_bf16(units, monkeypatch):
    """A plan compiled for made-up CPU devices has no f32 copies of weights that the real ones would not make."""
    args = operands("mi,oi->mo", WIDE, WIDE, jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert dots(lambda x, y: product("mi,oi->mo", x, y), *args)[0].count("xbf16") == 2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dots(lambda x, y: product("mi,oi->mo", x, y), *args)[0].count("xbf16") == 2


@pytest.mark.parametrize("units", [True, False], indirect=True)
def test_gradients_are_alike(units):
    """Of a linear map, each in the dtype of what it belongs to."""
    x, weight = operands("mi,oi->mo", WIDE, WIDE, jnp.bfloat16)
    weight = weight.astype(jnp.float32)
    gradient = jax.grad(lambda x, w: matmul(x, w).astype(jnp.float32).sum(), argnums=(0, 1))
    d_x, d_weight = gradient(x, weight)
    assert (d_x.dtype, d_weight.dtype) == (jnp.bfloat16, jnp.float32)
    kind = "xbf16" if products.has_bf16_units() else "xf32"
    assert all(found.count(kind) == 2 for found in dots(gradient, x, weight))
    np.testing.assert_allclose(d_weight, np.tile(np.float64(x).sum(0), (WIDE, 1)), atol=1e-4)
