# Requirements: Rust (rustup installs the version of rust-toolchain.toml), Go 1.26 or later, a C compiler and bash. The
# tests of the gateways also need Python with pip (for Envoy), and nginx or Debian's apt-get.
# Everything else is built from source into target/tools, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO_DENY_VERSION := 0.20.2
CARGO_DENY := target/tools/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny
HELM := target/tools/helm/helm

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

.PHONY: build
build: ## Build the operator, the verifier and the kubectl plugin
	cargo build --locked

.PHONY: tools
tools: ## Build or download Kubernetes, etcd, helm and the proxies for the tests
	tests/tools/build

# `demo` and `up` need one Kubernetes version only.
.PHONY: dev-tools
dev-tools: build
	tests/tools/build kubernetes-1.37 etcd helm
	cargo build --locked --example devcluster

.PHONY: demo
demo: dev-tools ## Demonstrate Keywright in a temporary control plane
	target/debug/examples/devcluster demo

.PHONY: up
up: dev-tools ## Start a control plane with operator and verifier in the background
	target/debug/examples/devcluster up

.PHONY: down
down: ## Stop the control plane of `make up`
	cargo build --locked --example devcluster
	target/debug/examples/devcluster down

# A part of the name of integration tests, as in T=lifecycle::rotation. Empty: all tests.
T ?=
.PHONY: test
ifeq ($(T),)
test: tools ## Run all tests; cluster tests also on the oldest supported Kubernetes
	cargo test --locked --no-run
	tests/run
else
test:
	cargo test --locked --test integration -- $(T)
endif

.PHONY: test-fast
test-fast: ## Check format and clippy, and run unit, property and architecture tests; no cluster
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo test --locked --lib --test architecture

MDBOOK_VERSION := 0.5.4
MDBOOK := target/tools/mdbook-$(MDBOOK_VERSION)/bin/mdbook
.PHONY: docs
docs: $(MDBOOK) ## Build the manual into target/book; its links are checked by the architecture tests
	$(MDBOOK) build docs
	cargo test --locked --test architecture documents::

$(MDBOOK):
	cargo install mdbook --version $(MDBOOK_VERSION) --locked --root target/tools/mdbook-$(MDBOOK_VERSION)

.PHONY: bench
bench: tools ## Run the benchmarks of the operator
	cargo bench --locked --bench keys

.PHONY: bench-verify
bench-verify: tools ## Run the benchmarks of the verifier, alone and behind real proxies
	cargo bench --locked --bench decision
	cargo bench --locked --bench verify

SECONDS_OF_SOAK ?= 600
.PHONY: soak
soak: tools ## Compare the verifier with a model for ten minutes of random changes
	KEYWRIGHT_SOAK_SECONDS=$(SECONDS_OF_SOAK) cargo test --locked --test integration -- --nocapture verifier::soak::

.PHONY: generate
generate: ## Generate CRDs, ClusterRoles and plain manifests from code and chart
	tests/tools/build helm
	cargo run --locked --bin keywright -- crds --directory crds
	install -m 644 crds/*.yaml charts/keywright/files/crds/
	cargo run --locked --bin keywright -- cluster-roles charts/keywright/files/coralogix.yaml > charts/keywright/files/cluster-roles.yaml
	$(HELM) template keywright charts/keywright --namespace keywright-system --set crds.keep=false \
		| grep -v -e 'app.kubernetes.io/managed-by: Helm' -e 'helm.sh/chart: ' > charts/manifests/keywright.yaml

.PHONY: lint
lint: $(CARGO_DENY) ## Check format, clippy, rustdoc, dependencies and the chart
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps --document-private-items
	$(CARGO_DENY) --locked check bans licenses sources
	tests/tools/build helm
	$(HELM) lint --strict charts/keywright

.PHONY: advisories
advisories: $(CARGO_DENY) ## Check dependencies for known vulnerabilities (downloads the database)
	$(CARGO_DENY) --locked check advisories

$(CARGO_DENY):
	cargo install cargo-deny --version $(CARGO_DENY_VERSION) --locked --root target/tools/cargo-deny-$(CARGO_DENY_VERSION)

.PHONY: clean
clean: ## Stop the control plane of `make up` and remove all build output
	[ ! -e target/dev ] || $(MAKE) down
	cargo clean
