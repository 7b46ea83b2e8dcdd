# Direct TCP and UDP over the same cables, routed and translated by the kernel.
CLASS=raw
up() { :; }
