# Every target installs what it needs. Without uv on the machine, uv is installed into the project.
UV ?= $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
UV_VERSION := 0.13.9

.PHONY: quickstart test test-slow test-demo lint docs gallery demo ui benchmark gpu setup

quickstart: setup  ## upsample the bundled photographs, then run a small real ablation; results are in outputs/
	$(UV) run --no-sync python -m experiments.upsample
	$(UV) run --no-sync python -m experiments.ablate experiment=quickstart

test: setup  ## everything that must pass, offline, on two cores
	$(UV) run --no-sync pytest -n 2 --dist loadfile

test-slow: setup  ## the tests that take minutes
	$(UV) run --no-sync pytest -m slow

lint: setup
	$(UV) run --no-sync ruff check .
	$(UV) run --no-sync ruff format --check .

docs: setup  ## build the documentation: open site/index.html
	$(UV) run --no-sync zensical build --strict --clean

UPSAMPLE = $(UV) run --no-sync python -m experiments.upsample tracking.enabled=false
PUBLISHED = checkpoint=anyup_multi_backbone backbone=vit_tiny16 max_size=240
gallery: setup  ## make the pictures of docs/gallery/ again; downloads AnyUp's published weights and ViT-Ti
	$(UPSAMPLE) 'images=[coffee,chelsea]' max_size=320 out_dir=docs/gallery/bundled
	$(UPSAMPLE) 'images=[flower,astronaut]' $(PUBLISHED) out_dir=docs/gallery/published
	$(UPSAMPLE) images=china $(PUBLISHED) uncertainty=true out_dir=docs/gallery/uncertainty
	rm docs/gallery/uncertainty/*.safetensors

demo: setup  ## a page to try upsamplers in a browser, at http://127.0.0.1:5006
	$(UV) run --no-sync python -m experiments.demo

test-demo: setup  ## the demo page in a real browser (needs Chromium), and its picture in docs/
	$(UV) run --inexact --group browser pytest -m slow tests/test_demo_browser.py --screenshot docs/demo.png

ui: setup  ## browse tracked runs
	$(UV) run --no-sync mlflow ui --backend-store-uri sqlite:///mlflow.db

benchmark: setup  ## measure docs/benchmark_cpu.md again
	$(UV) run --no-sync python -m experiments.benchmark

gpu: setup  ## on a machine with a GPU: measure correctness and cost within six minutes, into docs/benchmark_gpu*
	$(UV) run --no-sync python -m experiments.gpu

setup: .venv/.synced

.venv/.synced: pyproject.toml | $(UV)
	$(UV) sync
	touch $@

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv==$(UV_VERSION)
