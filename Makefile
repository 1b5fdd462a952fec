# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# `make` prints what there is to make.

PREFIX  ?= /usr/local
DESTDIR ?=
CARGO   ?= cargo

SUITES := tcg kvm lab

.PHONY: help
help:
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: setup
setup: ## install missing Debian packages, and the Python venv of the tests
	@scripts/setup

.PHONY: build
build: setup companion qemu ## the companion and the patched QEMU

.PHONY: companion
companion:
	$(CARGO) build --release --locked

# The library's own VMM; the tests boot guests with it.
.PHONY: embedded
embedded:
	$(CARGO) build --release --locked --example embedded

.PHONY: guardctl
guardctl: ## the program for the guest, static
	@$(MAKE) --no-print-directory -C guest-driver guardctl CARGO=$(CARGO)

.PHONY: qemu
qemu: setup
	@qemu-patches/build

# Where the tests look for it.
.PHONY: guests
guests:
	@$(MAKE) --no-print-directory -s -C tests/guests OUT=$(CURDIR)/build/guests

.PHONY: demo
demo: build ## boot a Linux guest, lock it, attack it
	@scripts/demo

# One suite after the other, each with its time, and all of them even if one fails.
.PHONY: check
check: build embedded guests ## every test: cargo's, then the functional suites tcg, kvm and lab
	@scripts/stages lint rust $(SUITES)

.PHONY: check-rust
check-rust: setup ## cargo's lints and tests only
	@scripts/stages lint rust

.PHONY: check-tcg check-kvm check-lab
check-tcg: build guests ## functional tests with TCG
	@scripts/stages tcg
check-kvm: build embedded guests ## functional tests with this machine's /dev/kvm
	@scripts/stages kvm
check-lab: build embedded guests ## functional tests with a stock kernel's KVM, in the lab
	@scripts/stages lab

.PHONY: lab
lab: build embedded guests ## a shell in the KVM lab's level 1
	@tests/lab/lab.py shell

.PHONY: bench
bench: build guests ## what it costs; see docs/performance.md
	@scripts/bench --plots docs/img

.PHONY: install
install: companion ## to $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/doc/vhost-guard/img
	install -m 755 target/release/vhost-guard $(DESTDIR)$(PREFIX)/bin/
	install -m 644 README.md CHANGELOG.md docs/*.md $(DESTDIR)$(PREFIX)/share/doc/vhost-guard/
	install -m 644 docs/img/*.svg $(DESTDIR)$(PREFIX)/share/doc/vhost-guard/img/

.PHONY: clean
clean: ## what was built here; the cache stays
	$(CARGO) clean
	rm -rf build
