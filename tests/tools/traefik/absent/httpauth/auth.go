// Package auth stands for the module by which Traefik checks user names and passwords, of which Traefik uses a copy of its own.
// No test has passwords: here, all are wrong.
package auth

import "net/http"

// CheckSecret tells whether a password is right.
func CheckSecret(password, secret string) bool { return false }

// BasicAuth asks for a password.
type BasicAuth struct {
	Realm   string
	Secrets func(user, realm string) string
}

// RequireAuth refuses.
func (*BasicAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { refuse(w) }

// DigestAuth asks for a password's digest.
type DigestAuth struct{}

// NewDigestAuthenticator makes one that knows nobody.
func NewDigestAuthenticator(string, func(user, realm string) string) *DigestAuth {
	return &DigestAuth{}
}

// CheckAuth knows nobody.
func (*DigestAuth) CheckAuth(*http.Request) (string, *string) { return "", nil }

// RequireAuth refuses.
func (*DigestAuth) RequireAuth(w http.ResponseWriter, _ *http.Request) { refuse(w) }

// RequireAuthStale refuses.
func (*DigestAuth) RequireAuthStale(w http.ResponseWriter, _ *http.Request) { refuse(w) }

// DigestAuthParams reads nothing.
func DigestAuthParams(string) map[string]string { return nil }

func refuse(w http.ResponseWriter) { w.WriteHeader(http.StatusUnauthorized) }
