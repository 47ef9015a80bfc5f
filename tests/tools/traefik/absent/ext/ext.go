// Package ext replaces the module for extensions of Traefik's configuration, which is a folder of Traefik's repository
// and is not published. It defines no extensions.
package ext

// HTTP is a part of the dynamic configuration of HTTP.
type HTTP struct{}

// Router is a part of the configuration of a router.
type Router struct{}
