{{/*
Names in the release's namespace are fixed: the operator's lease, the Service that the metrics API has its certificate
for, and the Secret that it keeps this in are known to the programs by name. What has no namespace, or lies in that of
Kubernetes, has the release's namespace in its name, so that releases do not take it from each other.
*/}}
{{- define "phoenix.clusterName" -}}
{{ .name }}:{{ .root.Release.Namespace }}
{{- end }}

{{/* Labels of an object; `name` is that of the program it belongs to. Those of pods never change within a version. */}}
{{- define "phoenix.podLabels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: phoenix
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{- define "phoenix.labels" -}}
{{ include "phoenix.podLabels" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "phoenix.selector" -}}
app.kubernetes.io/name: {{ .name }}
{{- end }}

{{/* An image's address: the digest wins over the tag. */}}
{{- define "phoenix.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .tag }}
{{- end -}}
{{- end }}

{{- define "phoenix.operatorImage" -}}
{{ include "phoenix.image" (dict "image" .Values.images.operator "tag" .Chart.AppVersion) }}
{{- end }}

{{/* The operator's settings file: `settings`, and what values of their own say. */}}
{{- define "phoenix.settings" -}}
{{- $images := .Values.images -}}
{{- $backends := list -}}
{{- range .Values.backends -}}
{{- $backends = append $backends (merge (dict "adminSecretRef" (dict "name" .existingSecret)) (omit . "existingSecret")) -}}
{{- end -}}
{{- $ours := dict
      "serverImage" (include "phoenix.image" (dict "image" $images.server "tag" .Chart.AppVersion))
      "serverGpuImage" (include "phoenix.image" (dict "image" $images.serverGpu "tag" (printf "%s-gpu" .Chart.AppVersion)))
      "imagePullPolicy" $images.pullPolicy
      "autoscaling" .Values.autoscaling
      "monitoring" (omit .Values.monitoring "rules")
      "backends" $backends -}}
{{ merge $ours .Values.settings | toYaml }}
{{- end }}

{{/* The manifests of `standalone.models`, each as a file of a ConfigMap. */}}
{{- define "phoenix.models" -}}
{{- range $name, $spec := .Values.standalone.models }}
{{ $name }}.yaml: |
  {{- $metadata := dict "name" $name "namespace" $.Release.Namespace }}
  {{- dict "apiVersion" "phoenix-ml.io/v1alpha1" "kind" "PhoenixModel" "metadata" $metadata "spec" $spec | toYaml | nindent 2 }}
{{- end }}
{{- end }}

{{/* A role and its binding. Takes root, kind, name, namespace (Role only), of (whose), account, accountNamespace, rules. */}}
{{- define "phoenix.granted" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}
metadata:
  name: {{ .name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- include "phoenix.labels" (dict "name" .of "root" .root) | nindent 4 }}
rules:
  {{- toYaml .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}Binding
metadata:
  name: {{ .name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- include "phoenix.labels" (dict "name" .of "root" .root) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ .kind }}
  name: {{ .name }}
subjects:
- kind: ServiceAccount
  name: {{ .account | default .of }}
  namespace: {{ .accountNamespace | default .root.Release.Namespace }}
{{- end }}

{{- define "phoenix.rights" -}}
{{ .Files.Get "files/rights.yaml" }}
{{- end }}

{{/* What the pods of both programs have in common, up to their containers. Takes root, name, values. */}}
{{- define "phoenix.pod" -}}
serviceAccountName: {{ .name }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .grace | default 30 }}
securityContext:
  {{- include "phoenix.podSecurity" .root | nindent 2 }}
  {{- if .readsAsGroup }}
  {{- with .root.Values.podSecurity.runAsGroup }}
  fsGroup: {{ . | int64 }}
  {{- end }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
affinity:
  {{- with omit .values.affinity "podAntiAffinity" }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  podAntiAffinity:
    {{- if .values.affinity.podAntiAffinity }}
    {{- toYaml .values.affinity.podAntiAffinity | nindent 4 }}
    {{- else }}
    preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "phoenix.selector" . | nindent 12 }}
    {{- end }}
{{- end }}

{{- define "phoenix.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.runAsUser }}
runAsUser: {{ . | int64 }}
{{- end }}
{{- with .Values.podSecurity.runAsGroup }}
runAsGroup: {{ . | int64 }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "phoenix.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Volumes, with the Secrets that values add. Takes values and tmp (the size of /tmp). */}}
{{- define "phoenix.volumes" -}}
- name: settings
  configMap:
    name: phoenix-operator-settings
- name: tmp
  emptyDir:
    sizeLimit: {{ .tmp }}
{{- include "phoenix.secretVolumes" .values }}
{{- end }}

{{- define "phoenix.secretVolumes" -}}
{{- range $index, $mount := .secretMounts }}
- name: secret-{{ $index }}
  secret:
    secretName: {{ $mount.name }}
{{- end }}
{{- end }}

{{- define "phoenix.volumeMounts" -}}
- name: settings
  mountPath: /etc/phoenix-operator
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- include "phoenix.secretMounts" . }}
{{- end }}

{{- define "phoenix.secretMounts" -}}
{{- range $index, $mount := .secretMounts }}
- name: secret-{{ $index }}
  mountPath: {{ $mount.path }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "phoenix.probe" -}}
httpGet:
  path: {{ index . 0 }}
  port: http
periodSeconds: {{ index . 1 }}
timeoutSeconds: 5
failureThreshold: {{ index . 2 }}
{{- end }}

{{/* Annotations of pods: a change of the settings is a rollout, because they are read at the start only. */}}
{{- define "phoenix.podAnnotations" -}}
checksum/settings: {{ include "phoenix.settings" .root | sha256sum }}
{{- with .values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "phoenix.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "phoenix.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "phoenix.selector" . | nindent 6 }}
{{- end }}

{{/* Of a monitor, whichever kind: what it selects, and where. */}}
{{- define "phoenix.monitor" -}}
apiVersion: monitoring.coreos.com/v1
kind: {{ .root.Values.monitoring.kind }}
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "phoenix.labels" . | nindent 4 }}
    {{- with .root.Values.monitoring.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      {{- include "phoenix.selector" . | nindent 6 }}
  {{ if eq .root.Values.monitoring.kind "PodMonitor" }}podMetricsEndpoints{{ else }}endpoints{{ end }}:
  - port: http
    interval: {{ .root.Values.monitoring.interval }}
{{- end }}
