// Package ext is where others than Traefik's authors add fields to its configuration. Traefik has it in a folder of its own
// repository, and imports it by the name of a module that was never published. Here, too, nobody adds anything.
package ext

// HTTP is a part of the dynamic configuration of HTTP.
type HTTP struct{}

// Router is a part of the configuration of a router.
type Router struct{}
