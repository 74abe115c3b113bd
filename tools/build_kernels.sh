#!/bin/sh
# Compiles server/kernels/*.cpp into the shared library that the server loads through ctypes.
# The wheel's build does the same (launcher/bin/build.rs); this is for working on a kernel.
# Usage: tools/build_kernels.sh [extra compiler flags]; CXX chooses the compiler.
set -eu
cd "$(dirname "$0")/.."
mkdir -p server/headrace/_native
out=server/headrace/_native/libheadrace_kernels.so
# A process that has the library open keeps the old file: the new one takes its name.
# shellcheck disable=SC2046
"${CXX:-c++}" $(grep -v '^#' server/kernels/flags.txt) "$@" server/kernels/*.cpp -o "$out.new.$$"
mv -f "$out.new.$$" "$out"
echo "$out"
