# What is needed: Rust (rustup takes the version of rust-toolchain.toml), Go 1.26 or later, a C compiler, bash. The tests
# of the proxies need Python with pip (for Envoy), and nginx or Debian's apt-get.
# Everything else is built from source into target/tools, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO_DENY_VERSION := 0.20.2
CARGO_DENY := target/tools/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny
HELM := target/tools/helm/helm

.PHONY: help
help: ## Show this
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

.PHONY: build
build: ## Build the operator and the command line
	cargo build --locked

.PHONY: tools
tools: ## Build the real Kubernetes, etcd, helm and proxies that the tests use
	tests/tools/build

# The demonstration and `up` need no second Kubernetes version.
.PHONY: dev-tools
dev-tools: build
	tests/tools/build kubernetes-1.37 etcd helm
	cargo build --locked --example devcluster

.PHONY: demo
demo: dev-tools ## See keys minted in a real control plane that ends afterwards
	target/debug/examples/devcluster demo

.PHONY: up
up: dev-tools ## Start a control plane with the operator, and leave it running
	target/debug/examples/devcluster up

.PHONY: down
down: ## End what `make up` started
	cargo build --locked --example devcluster
	target/debug/examples/devcluster down

.PHONY: test
test: tools ## Run all tests, and those against a cluster also on the oldest supported Kubernetes
	cargo test --locked --no-run
	tests/run

.PHONY: bench
bench: tools ## Measure the operator
	cargo bench --locked --bench keys

.PHONY: bench-verify
bench-verify: tools ## Measure the verifier, alone and behind real proxies
	cargo bench --locked --bench decision
	cargo bench --locked --bench verify

SECONDS_OF_SOAK ?= 600
.PHONY: soak
soak: tools ## Check every answer of the verifier against a model, for ten minutes
	KEYWRIGHT_SOAK_SECONDS=$(SECONDS_OF_SOAK) cargo test --locked --test verifier -- --nocapture soak::

.PHONY: generate
generate: ## Write the CRDs and the plain manifests from the code and the chart
	tests/tools/build helm
	cargo run --locked --bin keywright -- crds --directory crds
	install -m 644 crds/*.yaml charts/keywright/files/crds/
	cargo run --locked --bin keywright -- cluster-roles charts/keywright/files/coralogix.yaml > charts/keywright/files/cluster-roles.yaml
	$(HELM) template keywright charts/keywright --namespace keywright-system --set crds.keep=false \
		| grep -v -e 'app.kubernetes.io/managed-by: Helm' -e 'helm.sh/chart: ' > charts/manifests/keywright.yaml

.PHONY: lint
lint: $(CARGO_DENY) ## Check format, lints, documentation, dependencies and the chart
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps --document-private-items
	$(CARGO_DENY) --locked check bans licenses sources
	tests/tools/build helm
	$(HELM) lint --strict charts/keywright

.PHONY: advisories
advisories: $(CARGO_DENY) ## Check dependencies for known vulnerabilities (asks the network for the list)
	$(CARGO_DENY) --locked check advisories

$(CARGO_DENY):
	cargo install cargo-deny --version $(CARGO_DENY_VERSION) --locked --root target/tools/cargo-deny-$(CARGO_DENY_VERSION)

.PHONY: clean
clean: ## Remove all that was built; the cluster of `make up` is ended first
	[ ! -e target/dev ] || $(MAKE) down
	cargo clean
